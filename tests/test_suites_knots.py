"""The packaged KnOTS run files: three suites, a table of methods, and each dry run on a simulated hub."""

import pytest
import simulated_hub

from enmp_jax.cli import main as cli
from enmp_jax.config import run_file
from enmp_jax.config.compose import packaged_names

SUITES = ("knots-vit-b-32", "knots-vit-l-14", "knots-llama-3-8b")
NAMES = [name for name in packaged_names() if name.startswith("knots-") and name not in SUITES]


def test_every_suite_with_every_method_has_a_name():
    methods = ("tv", "ties", "dare-ties", "tsv", "iso", "knots-ties", "cart")
    expected = {f"{suite}-{method}" for suite in SUITES for method in methods}
    core = {f"{suite}-core-tsv-iso" for suite in SUITES[:2]} | {"knots-llama-3-8b-core-tsv"}
    assert set(NAMES) == expected | core and len(NAMES) == 24
    for suite in SUITES:
        plain = run_file.load(suite)
        for name in (n for n in NAMES if n.startswith(suite)):
            whole = run_file.load(name)
            assert (whole.base, whole.tasks, whole.search) == (plain.base, plain.tasks, plain.search)


def test_settings_of_the_reference():
    wanted = {  # vision, Llama: space, method, scale, density, drop rate, isotropic
        "tv": (("full", "sum", 0.1, None, None, False), ("full", "sum", 0.3, None, None, False)),
        "ties": (("full", "ties", 0.3, 0.4, None, False), ("full", "ties", 1.2, 0.8, None, False)),
        "dare-ties": (
            ("full", "dare_ties", 0.3, 0.2, 0.1, False), ("full", "dare_ties", 1.1, 0.8, 0.1, False)
        ),
        "tsv": (("full", "tsv", 0.3, None, None, False), ("full", "tsv", 0.6, None, None, False)),
        "iso": (("full", "iso", 4.0, None, None, False), ("full", "iso", 2.8, None, None, False)),
        "knots-ties": (("knots", "ties", 0.6, 0.9, None, False), ("knots", "ties", 1.1, 0.9, None, False)),
        "core-tsv": (("core", "tsv", 0.9, None, None, True), ("core", "tsv", 0.5, None, None, False)),
        "cart": (("full", "cart", "auto", None, None, False), ("full", "cart", "auto", None, None, False)),
    }  # fmt: skip
    for name, (vision, llama) in wanted.items():
        for suite, expected in (("vit-b-32", vision), ("vit-l-14", vision), ("llama-3-8b", llama)):
            suffix = "-iso" if name == "core-tsv" and suite != "llama-3-8b" else ""
            m = run_file.load(f"knots-{suite}-{name}{suffix}").merge
            shares = (m.hyperparameters.get("density"), m.hyperparameters.get("drop_rate"))
            found = (m.space, m.method, m.scale, *shares, m.isotropize)
            assert found == expected, (suite, name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return root, simulated_hub.make(root / "hub"), simulated_hub.make_data(root / "tfds")


@pytest.fixture(autouse=True)
def connected(request, monkeypatch, tmp_path):
    if "name" in request.fixturenames:
        root, download, load = request.getfixturevalue("hub")
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr("enmp_jax.data.huggingface._load", load)
        monkeypatch.setenv("TFDS_DATA_DIR", str(root / "tfds"))
        monkeypatch.chdir(tmp_path)


VISION_CLASSES = {
    "stanford_cars": 196, "dtd": 47, "eurosat": 10, "gtsrb": 43, "mnist": 10, "resisc45": 45, "sun397": 397,
    "svhn": 10,
}  # fmt: skip
LLAMA_CLASSES = {"snli": 3, "mnli": 3, "sick": 3, "qnli": 2, "rte": 2, "scitail": 2}


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name, capsys, tmp_path):
    assert cli.main(["search", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    suite, classes = ("Llama3_8B", LLAMA_CLASSES) if "llama" in name else ("ViT", VISION_CLASSES)
    for task, n in classes.items():
        assert f"{task}: hoffman-lab/KnOTS-{suite}" in out and f"_{task}, {n} classes," in out
    assert "under one mask" in out and "960 masks" in out and "nothing was written" in out
    assert not list(tmp_path.iterdir())


def test_a_missing_adapter_is_one_line(capsys, hub, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **_: hub[1]("nobody/" + repo, allow_patterns=1)
    )
    assert cli.main(["search", "knots-vit-b-32-tv", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "openai/clip-vit-base-patch32" in error
