"""Hub ids: what is asked for, what is recorded, and errors in one line. Never uses a network."""

import os

import numpy as np
import pytest

from enmp_jax.adapters import peft_import, read_adapter, save_adapter, single_file
from enmp_jax.errors import UserError
from enmp_jax.io import hub


def factors():
    return {"encoder.layers.0.q_proj": (np.ones((2, 6), np.float32), np.ones((4, 2), np.float32))}


class TestHub:
    """Hub ids, with a downloader that fills a fake cache instead of using a network."""

    @pytest.fixture
    def calls(self, tmp_path, monkeypatch):
        calls = []

        def download(repo, revision=None, allow_patterns=None):
            calls.append((repo, revision, allow_patterns))
            path = tmp_path / "cache" / "snapshots" / ("f" * 40)
            if not path.exists():
                save_adapter(path, factors(), 2, 2, "a/base")
            return str(path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.chdir(tmp_path)
        return calls

    def test_revision_files_and_commit(self, calls):
        found = read_adapter("some/adapter@v1.0")
        files = [peft_import.CONFIG, peft_import.WEIGHTS, *single_file.NAMES]
        assert calls == [("some/adapter", "v1.0", files)]
        assert found.commit == "f" * 40 and found.source == "some/adapter@v1.0"

    def test_a_directory_here_wins(self, calls, tmp_path):
        save_adapter(tmp_path / "some" / "adapter", factors(), 2, 2, None)
        assert read_adapter("some/adapter").commit is None
        assert not calls

    @pytest.mark.parametrize("error,text", [
        ("LocalEntryNotFoundError", "hub cannot be reached"),
        ("RepositoryNotFoundError", "HF_TOKEN"),
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("HfHubHTTPError", "500 server"),
    ])  # fmt: skip
    def test_errors_are_one_line(self, calls, monkeypatch, error, text):
        from types import SimpleNamespace

        from huggingface_hub import errors

        kind = getattr(errors, error)
        response = SimpleNamespace(headers={}, request=None)
        made = (
            kind("500\nserver")
            if error == "LocalEntryNotFoundError"
            else kind("500\nserver", response=response)
        )

        def fail(*args, **kwargs):
            raise made

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(UserError, match=text) as caught:
            read_adapter("some/adapter@v9")
        assert str(caught.value).isprintable()

    def test_a_mistyped_directory_is_told_from_a_hub_id(self, calls, tmp_path, monkeypatch):
        """``experts/cras`` may be a hub id; with ``experts/`` here, it is a directory that is not."""
        from huggingface_hub import errors

        def fail(*args, **kwargs):
            raise errors.LocalEntryNotFoundError("offline")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        save_adapter(tmp_path / "experts" / "cars", factors(), 2, 2, None)
        with pytest.raises(UserError, match="no such directory.*experts is a directory here.*'cars'"):
            read_adapter("experts/cras")
        with pytest.raises(UserError, match="there is no such directory;.*did you mean 'cars'"):
            read_adapter("./experts/cras")
        with pytest.raises(UserError, match="no such directory here") as caught:
            read_adapter("someone/adapter")
        assert "is a directory here" not in str(caught.value)

    def test_a_directory_with_only_checkpoints_names_the_newest(self, tmp_path):
        for step in (20, 100):
            save_adapter(tmp_path / f"checkpoint-{step}", factors(), 2, 2, None)
        with pytest.raises(UserError, match="checkpoint-100$"):
            read_adapter(tmp_path)

    def test_offline_is_honoured_by_the_library(self, tmp_path):
        """In a fresh process, with an empty cache: one line, and no attempt to connect."""
        import subprocess
        import sys

        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": "none"}
        code = (
            "from enmp_jax.io.hub import locate\nfrom enmp_jax.errors import UserError\n"
            "try: locate('nobody/nothing', ['*.json'])\nexcept UserError as e: print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert "not in the cache" in done.stdout, done.stderr

    def test_importing_the_reader_needs_no_torch(self):
        import subprocess
        import sys

        code = "import sys, enmp_jax.adapters.hf_export, enmp_jax.cli.inspect; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "False", done.stderr


def test_hub_ids_are_told_from_paths():
    assert hub.hub_id("name/adapter@main") == ("name/adapter", "main")
    for path in ("./a/b", "/a/b", "a/b/c", "~/a", "a", "a@b/c/d", "a/../b", "", None):
        assert hub.hub_id(path) is None


def test_only_models_have_hub_ids_without_an_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.hub_id("gpt2@main", ownerless=True) == ("gpt2", "main")
    (tmp_path / "gpt2").mkdir()
    assert hub.hub_id("gpt2", ownerless=True) is None
