"""``enmp verify`` on what PEFT itself makes wrong without a word: its issues 3737 and 3761."""

import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import tiny_models as tiny
import yaml

from enmp_jax.adapters.checks import parts_of, passed
from enmp_jax.adapters.peft_import import read_adapter
from enmp_jax.adapters.peft_reload import check_peft
from enmp_jax.cli import main as cli
from enmp_jax.runs.verify import verify

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base("llama", tmp_path_factory.mktemp("llama"))


def adapters(base, root, **options):
    """Two adapters, and what ``enmp merge --method sum`` makes of them."""
    words = ["merge", "--method", "sum", "--format", "peft", "--out", str(root / "merged")]
    for seed, task in enumerate(("one", "two")):
        tiny.make_adapter("llama", base, root / task, seed, task_type=None, **options)
        words += ["--adapter", f"{task}={root / task}"]
    assert cli.main(words) == 0
    return root


def by_peft(base, root, kind):
    """The same sum by ``add_weighted_adapter``, with the recipe of ours beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(
            tiny.load_base("llama", base), root / "one", adapter_name="one"
        )
        model.load_adapter(root / "two", adapter_name="two")
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "peft", combination_type=kind)
        model.save_pretrained(root, selected_adapters=["peft"])
    (root / "peft/enmp_config.yaml").write_text((root / "merged/enmp_config.yaml").read_text())
    (report,) = verify(str(root / "peft"), {task: str(root / task) for task in ("one", "two")})
    return {check.name: check for check in report.checks}


def verified(root, name):
    return verify(str(root / name), {task: str(root / task) for task in ("one", "two")})[0].checks


def test_a_plain_sum_by_peft_passes(base, tmp_path):
    root = adapters(base, tmp_path)
    checks = by_peft(base, root, "cat")
    assert passed(list(checks.values())) and checks["PEFT applies it"].ok
    assert passed(verified(root, "merged"))


def test_peft_3761_a_merge_of_rslora_adapters_by_peft_does_not_pass(base, tmp_path):
    root = adapters(base, tmp_path, use_rslora=True)
    checks = by_peft(base, root, "cat")
    assert checks["reads"].ok and not checks["weights"].ok
    assert passed(verified(root, "merged"))  # ours of the same adapters


def test_peft_3737_an_adapter_of_rank_patterns_that_peft_cannot_load_again(base, tmp_path):
    root = adapters(base, tmp_path, rank_pattern={"k_proj": 2})
    checks = by_peft(base, root, "linear")
    assert not passed(list(checks.values())), checks
    assert passed(verified(root, "merged"))


@pytest.mark.parametrize("options", [
    {"use_rslora": True, "r": 5}, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 3}},
])  # fmt: skip
def test_adapters_alone_come_back_with_the_weights_that_peft_gives_them(base, tmp_path, options):
    path = tiny.make_adapter("llama", base, tmp_path / "adapter", 0, task_type=None, **options)
    (report,) = verify(str(path), {})
    checks = {check.name: check for check in report.checks}
    assert passed(report.checks) and checks["PEFT applies it"].ok and checks["import and export"].ok


def test_peft_is_really_asked(base, tmp_path):
    """Deltas that are not PEFT's do not pass."""
    path = tiny.make_adapter("llama", base, tmp_path / "adapter", 0, task_type=None)
    adapter = read_adapter(path)
    wrong = {
        name: (left * np.float32(1.001), right) for name, (left, right) in parts_of(adapter.modules).items()
    }
    assert [check.ok for check in check_peft(adapter, wrong, 0.0)] == [True, False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_load_in_transformers_and_answer_as_claimed(base, tmp_path, dtype, monkeypatch):
    root = adapters(base, tmp_path)
    words = [
        "merge",
        "--method",
        "ties",
        "--format",
        "checkpoint",
        "--base-model",
        str(base),
        "--dtype",
        dtype,
    ]
    for task in ("one", "two"):
        words += ["--adapter", f"{task}={root / task}"]
    assert cli.main([*words, "--out", str(root / "model")]) == 0
    sources = {task: str(root / task) for task in ("one", "two")}
    (report,) = verify(str(root / "model"), sources, str(base))
    checks = {check.name: check for check in report.checks}
    assert passed(report.checks), report.checks
    assert checks["transformers loads it"].counts and checks["outputs"].counts
    config = yaml.safe_load((root / "model/enmp_config.yaml").read_text())
    config["merge"]["density"] = 0.9
    (root / "model/enmp_config.yaml").write_text(yaml.safe_dump(config))
    (report,) = verify(str(root / "model"), sources, str(base))
    assert not {check.name: check for check in report.checks}["weights"].ok
