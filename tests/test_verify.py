"""``enmp verify``: what is right passes, and every way of being silently wrong that users met does not."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import yaml
from adapter_files import keep, loaded, make, make_base  # noqa: F401 (fixtures)

from enmp_jax.cli import main as cli


@pytest.fixture
def exports(loaded, tmp_path, monkeypatch, capfd):  # noqa: F811
    """All formats of one merge under a mask, next to the adapters that it is of."""
    here = tmp_path / "secret-user"
    make_base(here / "base")
    monkeypatch.chdir(here)
    words = ["merge", "--adapter", "cars=cars", "--adapter", "dtd=dtd", "--prune", "0:cars", "--scale", "0.5"]
    words += ["--method", "ties", "--density", "0.4", "--base-model", "base"]
    for kind in ("peft", "delta", "adapters", "checkpoint"):
        assert cli.main([*words, "--format", kind, "--out", kind]) == 0
    capfd.readouterr()
    return here


def verified(*words, code=0):
    assert cli.main(["verify", *map(str, words)]) == code


def rewrite(path, change):
    """Tensors of a file, changed."""
    tensors = {k: np.ascontiguousarray(v) for k, v in change(safetensors.numpy.load_file(path)).items()}
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def reconfigure(path, **changes):
    path = path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_and_all_exports_pass(exports, capfd):
    verified("cars", "dtd", "peft", "delta", "adapters", "checkpoint", "--base-model", "base")
    out = capfd.readouterr().out
    assert "NOT" not in out.replace(
        "NOT  vLLM: keys", ""
    )  # a head that vLLM does not take: told, not counted
    for line in ("ok   import and export", "ok   weights", "ok   not the base", "ok   cars: weights"):
        assert line in out, line
    verified("peft", "--json")
    (report,) = json.loads(capfd.readouterr().out)
    assert report["ok"] and {"name", "ok", "detail", "counts"} == set(report["checks"][0])


def scaled(tensors):
    return {key: value * np.float32(1.02) if "lora_B" in key else value for key, value in tensors.items()}


def without_one(tensors):
    gone = sorted(tensors)[0].rsplit(".lora_", 1)[0]
    return {key: value for key, value in tensors.items() if not key.startswith(gone)}


@pytest.mark.parametrize("change,message", [(scaled, "weights"), (without_one, "1 missing")])
def test_adapters_with_other_weights_do_not_pass(exports, capfd, change, message):
    rewrite(exports / "peft/adapter_model.safetensors", change)
    verified("peft", code=1)
    wrong = [line for line in capfd.readouterr().out.splitlines() if "NOT" in line]
    assert any(message in line for line in wrong), wrong


def test_another_scaling_of_the_same_tensors_does_not_pass(exports, capfd):
    """PEFT #3761: ``use_rslora`` copied to a merged adapter inflates it by the root of its rank."""
    reconfigure(exports / "peft", use_rslora=True)
    verified("peft", code=1)
    assert "NOT  weights" in capfd.readouterr().out


def test_an_adapter_that_does_not_load_again_does_not_pass(exports, capfd):
    """PEFT #3737: tensors of another rank than the configuration says."""
    rank = json.loads((exports / "peft/adapter_config.json").read_text())["r"]
    reconfigure(exports / "peft", r=rank + 3)
    verified("peft", code=1)
    assert f"the configuration says rank {rank + 3}" in capfd.readouterr().out


def test_a_merged_model_that_is_its_base_does_not_pass(exports, capfd):
    """verl #7285: the merged directory is byte-identical to the base."""
    shutil.copyfile(exports / "base/model.safetensors", exports / "checkpoint/model.safetensors")
    verified("checkpoint", "--base-model", "base", code=1)
    assert "NOT  not the base  0 of" in capfd.readouterr().out


def test_checkpoints_with_a_tensor_more_or_a_changed_one_do_not_pass(exports, capfd):
    path = exports / "checkpoint/model.safetensors"
    rewrite(path, lambda t: t | {"extra": np.zeros(2, np.float32)})
    verified("checkpoint", "--base-model", "base", code=1)
    assert "NOT  tensors       1 extra (extra)" in capfd.readouterr().out
    rewrite(path, lambda t: {k: v * 2 if "embed" in k else v for k, v in t.items() if k != "extra"})
    verified("checkpoint", "--base-model", "base", code=1)
    assert "model.embed_tokens.weight differ" in capfd.readouterr().out


def test_deltas_and_pruned_adapters_that_were_changed_do_not_pass(exports, capfd):
    rewrite(exports / "delta/delta.safetensors", lambda t: {k: v * 1.001 for k, v in t.items()})
    rewrite(exports / "adapters/dtd/adapter_model.safetensors", scaled)
    verified("delta", "adapters", code=1)
    out = capfd.readouterr().out
    assert "NOT  weights" in out and "NOT  dtd: weights" in out and "ok   cars: weights" in out


def test_adapters_that_are_gone_or_others_are_one_line(exports, tmp_path, capfd):
    config = yaml.safe_load((exports / "peft/enmp_config.yaml").read_text())
    make(tmp_path / "other", 5)
    cases = {
        ("nowhere",): "no such directory",
        (tmp_path,): "is no adapter, no export",
        ("checkpoint",): "give --base-model",
        ("peft", "--adapter", f"cars={tmp_path / 'other'}"): "its hash differs",
    }
    for words, message in cases.items():
        verified(*words, code=2)
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line, line
    shutil.move(exports / "cars", tmp_path / "cars")
    verified("peft", code=2)
    assert "--adapter cars=DIR" in capfd.readouterr().err and config["tasks"][0]["adapter"] == "cars"
    verified("peft", "--adapter", f"cars={tmp_path / 'cars'}")
    (exports / "peft/enmp_config.yaml").write_text("format: soup")
    verified("peft", code=2)
    assert "format must be one of" in capfd.readouterr().err
