"""Hub ids: what is asked for, what is recorded, and errors in one line. Never uses a network."""

import os

import numpy as np
import pytest

from enmp_jax.adapters import hub, peft_import, read_adapter, save_adapter
from enmp_jax.errors import UserError


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
        assert calls == [("some/adapter", "v1.0", [peft_import.CONFIG, peft_import.WEIGHTS])]
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
    assert hub._HUB_ID.fullmatch("name/adapter@main")
    for path in ("./a/b", "/a/b", "a/b/c", "~/a", "a", "a@b/c/d"):
        assert not hub._HUB_ID.fullmatch(path)
