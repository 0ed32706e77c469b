"""Adapters of any architecture: modules by path alone, several stacks, kinds of layers, single files."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import RECIPE, load_all

from enmp_jax import merges
from enmp_jax.adapters import load_adapters, read_adapter, save_adapter, single_file
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.lora_encoding import encode
from enmp_jax.adapters.peft_export import export_adapters
from enmp_jax.adapters.stored import Stored
from enmp_jax.cli import main as cli
from enmp_jax.errors import UserError
from enmp_jax.io.shards import LowRankUpdate, StackedUpdate
from enmp_jax.lora import stack_adapters
from enmp_jax.masks import MaskSpec
from enmp_jax.merges.base import merge_stack
from enmp_jax.module_paths import lay_out
from enmp_jax.runs import mask_file

T5 = {
    **{f"encoder.block.{i}.layer.0.SelfAttention.q": (6, 4) for i in range(2)},
    **{f"decoder.block.{i}.layer.0.SelfAttention.q": (6, 4) for i in range(3)},
    **{f"decoder.block.{i}.layer.1.EncDecAttention.q": (8, 4) for i in range(3)},
    "lm_head": (11, 4),
}
UNET = {
    "conv_in": (8, 36),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 8),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (16, 16),
    "mid_block.attentions.0.proj_in": (16, 16),
}


def factors(shapes, seed, rank=2):
    random = np.random.default_rng(seed)
    return {
        path: (
            random.normal(size=(rank, n)).astype(np.float32), random.normal(size=(m, rank)).astype(np.float32)
        )
        for path, (m, n) in shapes.items()
    }  # fmt: skip


def save(path, shapes, seed, **changes):
    save_adapter(path, factors(shapes, seed), 2, 2, None)
    if changes:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def dense(modules):
    return {path: b @ a for path, (a, b) in modules.items()}


@pytest.mark.parametrize("shapes", [T5, UNET], ids=["T5", "UNet"])
def test_every_module_is_merged_under_its_own_path_and_no_other(shapes, tmp_path):
    fewer = {path: shape for path, shape in shapes.items() if "to_out" not in path}
    for task, own in (("x", shapes), ("y", fewer)):
        save(tmp_path / task, own, ord(task))
    options = [word for task in "xy" for word in ("--adapter", f"{task}={tmp_path / task}")]
    alone = next(path for path in shapes if "." not in path)  # in no layer
    words = ["merge", *options, "--method", "sum", "--scale", "0.5", "--prune", f"{alone}:x"]
    assert cli.main([*words, "--out", str(tmp_path / "o")]) == 0
    found = load_all(tmp_path / "o")
    assert found.keys() == {f"{path}.weight" for path in shapes}
    one, other = dense(factors(shapes, ord("x"))), dense(factors(fewer, ord("y")))
    for path in shapes:
        wanted = 0.5 * (one[path] * (path != alone) + other.get(path, 0))
        np.testing.assert_allclose(found[f"{path}.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert cli.main(["verify", str(tmp_path / "o"), *options]) == 0


def test_groups_of_several_stacks_and_of_paths_without_a_layer():
    stack = stack_adapters({"x": factors(T5, 0)})
    names = ["decoder.block.0", "decoder.block.1", "decoder.block.2", "encoder.block.0", "encoder.block.1"]
    assert stack.groups == (*names, "lm_head")
    spec = MaskSpec.of(stack, "projection")
    assert spec.present().sum() == len(T5)
    keep = spec.keep_from_pruned([("block.2", "EncDecAttention.q", "x"), ("lm_head", "lm_head", "x")])
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(stack), jnp.asarray(keep), 1.0)
    zero = {
        path
        for name, delta in deltas.items()
        for path, weight in zip(stack.paths(name), np.asarray(delta.materialise()), strict=True)
        if not weight.any()
    }
    assert zero == {"decoder.block.2.layer.1.EncDecAttention.q", "lm_head"}
    assert spec.pruned_modules(keep)[0] == ("decoder.block.2", "{}.layer.1.EncDecAttention.q", "x")
    with pytest.raises(UserError, match="no group of modules 'encoder.block.5'; did you mean 'encoder"):
        spec.keep_from_pruned([("encoder.block.5", "q", "x")])
    with pytest.raises(UserError, match="no group of modules 2"):
        spec.keep_from_pruned([(2, "q", "x")])


def test_many_projections_are_merged_one_by_one_to_the_same(monkeypatch):
    monkeypatch.setattr("enmp_jax.merges.base._FEW", 0)
    stack = stack_adapters({"x": factors(T5, 0), "y": factors(T5, 1)})
    spec = MaskSpec.of(stack, "projection")
    keep = spec.keep_from_pruned([("decoder.block.0", "SelfAttention.q", "x"), ("lm_head", "lm_head", "y")])
    merge = merges.make("mean")
    whole = merge.merge(merge.prepare(stack), jnp.asarray(keep), 0.5)
    found = merge_stack(merge, stack, jnp.asarray(keep), 0.5)
    assert found.keys() == whole.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta.materialise(), whole[name].materialise(), rtol=1e-5, atol=1e-6)


def test_inspect_shows_stacks_and_whole_modules(tmp_path, capsys):
    save(tmp_path / "x", T5, 0)
    assert cli.main(["inspect", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "{}.layer.0.SelfAttention.q: 6x4, layers decoder.block.0-2, encoder.block.0-1, rank 2" in shown
    assert "  lm_head: 11x4, layers lm_head, rank 2" in shown
    assert "encoder.block.1: " in shown.split("norms")[1]


def test_masks_of_groups_come_back(tmp_path):
    save(tmp_path / "x", T5, 0)
    loaded = load_adapters({"x": tmp_path / "x"})
    spec = MaskSpec.of(loaded.stack)
    keep = spec.keep_from_pruned([("encoder.block.1", "x"), ("lm_head", "x")])
    saved = mask_file.from_json(json.loads(json.dumps(spec.to_json(keep, 1.0))), loaded.stack)
    np.testing.assert_array_equal(saved.keep, keep)
    export_adapters(tmp_path / "o", loaded, keep, RECIPE)
    left = set(read_adapter(tmp_path / "o" / "x").modules)
    assert left == {path for path in T5 if "encoder.block.1" not in path and path != "lm_head"}


def test_a_name_of_several_shapes_is_as_many_stacks():
    layout = lay_out(UNET)
    name = "{}.attn1.to_q"
    assert {n for n, _ in layout.places.values()} >= {f"{name}@8x8", f"{name}@16x16", "conv_in"}
    assert layout.groups[0] == "conv_in" and len(layout.groups) == 5
    # one stack of layers: numbers, whatever the widths
    layout = lay_out({f"layers.{i}.up": (4 + i, 3) for i in range(3)})
    assert layout.groups == (0, 1, 2) and layout.places["layers.2.up"] == ("layers.{}.up@6x3", 2)


def test_random_methods_draw_by_the_path_of_a_group():
    modules = factors(T5, 0)
    merge = merges.make("dare", drop_rate=0.5)

    def merged(own):
        stack = stack_adapters({"x": own})
        deltas = merge.merge(merge.prepare(stack), np.ones((stack.n_layers, 1), bool), 1.0)
        return {p: w for n, d in deltas.items() for p, w in zip(stack.paths(n), np.asarray(d.materialise()))}

    every = merged(modules)
    some = merged({path: modules[path] for path in T5 if "block.0" not in path})
    for path, weight in some.items():
        np.testing.assert_allclose(weight, every[path], atol=1e-6)


def test_layer_scaling_needs_one_stack():
    with pytest.raises(
        UserError, match="one stack of numbered layers: these adapters also have decoder.block.0"
    ):
        merges.make("sum", layer_scaling=(0.5, 1)).prepare(stack_adapters({"x": factors(T5, 0)}))
    stack = stack_adapters({"x": factors({"m.0.q": (3, 3), "m.2.q": (3, 3), "m.1.k": (3, 3)}, 0)})
    scaled, plain = (merges.make("sum", **x) for x in ({"layer_scaling": (0, 1)}, {}))
    keep = np.ones((3, 1), bool)
    ours, theirs = (m.merge(m.prepare(stack), keep, 1.0)["m.{}.q"].materialise() for m in (scaled, plain))
    np.testing.assert_allclose(ours, theirs * np.array([0, 1])[:, None, None], atol=1e-6)


def test_a_mask_of_a_backbone_is_used_without_it(tmp_path):
    """The backbone has a layer more than the adapters, and its own names."""
    modules = {f"vision.layers.{i}.{n}_proj": (3, 3) for i in range(2) for n in "qk"}
    save(tmp_path / "x", modules, 0)
    canonical = {f"vision.layers.{{}}.{n}_proj": f"h.{{}}.{n}" for n in "qk"}.get
    with_base = load_adapters({"x": tmp_path / "x"}, canonical, n_layers=3)
    spec = MaskSpec.of(with_base.stack, "projection")
    keep = spec.keep_from_pruned([(1, "q", "x")])
    data = spec.to_json(keep, 1.0, None, {"x": "hash"}, with_base.spelling)
    without = load_adapters({"x": tmp_path / "x"})
    saved = mask_file.from_json(data, without.stack)
    assert saved.spec.pruned_modules(saved.keep) == [(1, "vision.layers.{}.q_proj", "x")]
    with pytest.raises(UserError, match="for 3 layers, but the adapters have 2"):
        mask_file.from_json({k: v for k, v in data.items() if k != "adapters"}, without.stack)


KINDS = {
    "linear": (None, (6, 4)),
    "transposed": (Stored("transposed", (4, 6)), (6, 4)),
    "convolution": (Stored("convolution", (6, 2, 3, 3)), (6, 18)),
    "embedding": (Stored("embedding", (11, 4)), (4, 11)),
}


def tensors_of(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers(kind, tmp_path):
    """PEFT's tensors in, and out again; the delta as the base keeps the weight."""
    stored, shape = KINDS[kind]
    a, b = factors({"p": shape}, 0)["p"]
    path = tmp_path / "x"
    save(path, {"m.0.p": shape}, 0, fan_in_fan_out=kind == "transposed", lora_alpha=4)
    keys = encode({"m.0.p": (a, b)}, {"m.0.p": stored} if stored else {}, 2)
    raw = {f"base_model.model.{key}": np.ascontiguousarray(value) for key, value in keys.items()}
    if kind == "convolution":
        assert {x.shape for x in raw.values()} == {(2, 2, 3, 3), (6, 2, 1, 1)}
    safetensors.numpy.save_file(raw, path / "adapter_model.safetensors")
    adapter = read_adapter(path)
    assert adapter.stored == ({"m.0.p": stored} if stored else {})
    np.testing.assert_array_equal(adapter.modules["m.0.p"][1], 2 * b)
    words = ["merge", "--adapter", f"x={path}", "--method", "sum", "--out"]
    assert cli.main([*words, str(tmp_path / "delta")]) == 0
    file = tmp_path / "delta" / "delta.safetensors"
    weight = load_all(tmp_path / "delta")["m.0.p.weight"]
    wanted = 2 * b @ a
    if kind != "linear":
        wanted = wanted.reshape(6, 2, 3, 3) if kind == "convolution" else wanted.T
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)
    (size,) = struct.unpack("<Q", file.read_bytes()[:8])
    told = json.loads(file.read_bytes()[8 : 8 + size]).get("__metadata__", {}).get("layout")
    assert (told is None) == (kind == "linear")
    loaded = load_adapters({"x": path})
    export_adapters(tmp_path / "o", loaded, np.ones((1, 1), bool), RECIPE)
    back = tensors_of(tmp_path / "o" / "x")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in raw.items()}


EXPERTS = ("gate_up_proj", "down_proj")


def mixture(path, flip):
    """PEFT's file of an adapter with ``target_parameters``, and what it adds to each parameter."""
    random = np.random.default_rng(0)
    shapes, tensors, wanted = {"gate_up_proj": (8, 4), "down_proj": (4, 5)}, {}, {}
    for depth, name in enumerate(reversed(EXPERTS)):
        out, inner = shapes[name]
        a = random.normal(size=(3 * 2, inner)).astype(np.float32)
        b = random.normal(size=(out, 2 * 3)).astype(np.float32)
        key = "base_model.model.layers.0.mlp.experts" + ".base_layer" * depth
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        delta = np.einsum("ore,eri->eoi", b.reshape(out, 2, 3), a.reshape(3, 2, inner))
        wanted[f"layers.0.mlp.experts.{name}"] = delta.swapaxes(1, 2) if flip else delta
    save(path, {"layers.0.q": (4, 4)}, 0, target_parameters=[f"experts.{name}" for name in EXPERTS])
    own = tensors_of(path)
    safetensors.numpy.save_file(own | tensors, path / "adapter_model.safetensors")
    return own | tensors, wanted


@pytest.mark.parametrize("flip", [False, True])
def test_experts_in_one_parameter(flip, tmp_path):
    raw, wanted = mixture(tmp_path / "x", flip)
    loaded = load_adapters({"x": tmp_path / "x"})
    assert len(loaded.adapters["x"].modules) == 1 + 2 * 3
    export_adapters(tmp_path / "o", loaded, np.ones((1, 1), bool), RECIPE)
    back = tensors_of(tmp_path / "o" / "x")
    assert back.keys() == raw.keys()
    for key, value in raw.items():
        np.testing.assert_array_equal(back[key], value)
    base = tmp_path / "base"
    base.mkdir()
    kind = "gpt_oss" if flip else "qwen3_moe"
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    zeros = {name: np.zeros(delta.shape, np.float32) for name, delta in wanted.items()}
    safetensors.numpy.save_file(
        zeros | {"layers.0.q.weight": np.zeros((4, 4), np.float32)}, base / "model.safetensors"
    )
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(loaded.stack), np.ones((1, 1), bool), 1.0)
    export_checkpoint(tmp_path / "c", loaded, deltas, base, RECIPE)
    found = load_all(tmp_path / "c")
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-5, atol=1e-6)


def test_experts_in_one_parameter_are_found_in_a_base_with_a_tensor_for_each(tmp_path):
    _, wanted = mixture(tmp_path / "x", False)
    loaded = load_adapters({"x": tmp_path / "x"})
    up, down = (wanted[f"layers.0.mlp.experts.{name}"] for name in EXPERTS)
    whole = {"layers.0.q.weight": np.zeros((4, 4), np.float32)}
    for e in range(3):
        name = f"layers.0.mlp.experts.{e}"
        parts = {"gate_proj": up[e, :4], "up_proj": up[e, 4:], "down_proj": down[e]}
        whole |= {f"{name}.{part}.weight": x.astype(np.float32) for part, x in parts.items()}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    safetensors.numpy.save_file(
        {name: np.zeros_like(x) for name, x in whole.items()}, base / "model.safetensors"
    )
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(loaded.stack), np.ones((1, 1), bool), 1.0)
    export_checkpoint(tmp_path / "c", loaded, deltas, base, RECIPE)
    found = load_all(tmp_path / "c")
    for name in whole.keys() - {"layers.0.q.weight"}:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=1e-6)


def test_rows_of_parts_are_those_of_their_stack():
    random = np.random.default_rng(0)
    parts = {e: LowRankUpdate(random.normal(size=(4, 2)), random.normal(size=(2, 3))) for e in (0, 2)}
    update = StackedUpdate(parts, (3, 4, 3))
    whole = np.concatenate([parts[e].rows(0, 4) if e in parts else np.zeros((4, 3)) for e in range(3)])
    for start, stop in ((0, 12), (2, 9), (4, 8), (11, 12)):
        np.testing.assert_allclose(update.rows(start, stop), whole[start:stop], atol=1e-6)


def base_model(path, weight):
    path.mkdir()
    (path / "config.json").write_text("{}")
    safetensors.numpy.save_file({"model.layers.0.q.weight": weight}, path / "model.safetensors")
    return path


def test_dora_is_folded_with_its_base_and_refused_without(tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    base = base_model(tmp_path / "base", weight)
    path = save(tmp_path / "x", {"layers.0.q": (6, 4)}, 0, use_dora=True)
    magnitude = np.linspace(0.5, 2, 6, dtype=np.float32)
    own = tensors_of(path) | {"base_model.model.layers.0.q.lora_magnitude_vector": magnitude}
    safetensors.numpy.save_file(own, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"DoRA rescales the base model's weights.*--base-model DIR"):
        read_adapter(path)
    a, b = read_adapter(path, base).modules["layers.0.q"]
    adapted = weight + dense(factors({"p": (6, 4)}, 0))["p"]
    wanted = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True) - weight
    np.testing.assert_allclose(b @ a, wanted, atol=1e-5)
    with pytest.raises(UserError, match=r"6x4.*|7x4"):
        read_adapter(path, base_model(tmp_path / "other", np.ones((7, 4), np.float32)))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_subtract_from_the_base_are_against_the_base_itself(init, tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    base = base_model(tmp_path / "base", weight)
    path = save(tmp_path / "x", {"layers.0.q": (6, 4)}, 0, init_lora_weights=init, lora_alpha=3)
    with pytest.raises(UserError, match="changes the base model's weights"):
        read_adapter(path)
    a, b = read_adapter(path, base).modules["layers.0.q"]
    trained = 1.5 * dense(factors({"p": (6, 4)}, 0))["p"]
    if init == "pissa":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        start = (u[:, :2] * s[:2]) @ vt[:2]
    else:
        q, r = np.linalg.qr(weight)
        start = 1.5 * q[:, :2] @ r[:2]
    np.testing.assert_allclose(b @ a, trained - start, atol=1e-5)


FLAT = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize(
    "flat, path",
    [
        (FLAT, "lora_unet_down_blocks.1.attentions.0.transformer_blocks.0.attn1_to_out.0"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "lora_te_text_model_encoder_layers.11.mlp_fc1"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks.4.1.proj_in"),
        ("lora_unet_conv_in", "lora_unet_conv_in"),
    ],
)
def test_names_of_kohya_can_be_undone(flat, path):
    assert single_file.dotted(flat) == path and single_file.flat(path) == flat


def kohya(path, alpha=None):
    random = np.random.default_rng(0)
    down, up = (
        random.normal(size=(2, 3, 3, 3)).astype(np.float32),
        random.normal(size=(4, 2, 1, 1)).astype(np.float32),
    )
    tensors = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up}
    safetensors.numpy.save_file(
        tensors | ({} if alpha is None else {f"{FLAT}.alpha": np.array(alpha, np.float32)}), path
    )
    return (up.reshape(4, 2) @ down.reshape(2, 27)).reshape(4, 3, 3, 3)


@pytest.mark.parametrize("alpha, scaling", [(None, 1), (1.0, 0.5)])
def test_single_files_of_kohya_are_read_and_written(alpha, scaling, tmp_path):
    product = kohya(tmp_path / "x.safetensors", alpha)
    words = ["merge", "--adapter", f"x={tmp_path / 'x.safetensors'}", "--method", "sum"]
    assert cli.main([*words, "--out", str(tmp_path / "delta")]) == 0
    np.testing.assert_allclose(load_all(tmp_path / "delta")[f"{FLAT}.weight"], scaling * product, rtol=1e-5)
    assert cli.main([*words, "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    written = safetensors.numpy.load_file(tmp_path / "peft" / "lora.safetensors")
    assert written.keys() == {f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", f"{FLAT}.alpha"}
    assert not (tmp_path / "peft" / "adapter_config.json").exists()
    again = read_adapter(tmp_path / "peft")
    ((a, b),) = again.modules.values()
    np.testing.assert_allclose((b @ a).reshape(product.shape), scaling * product, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{FLAT}.hada_w1_a": np.ones((2, 2), np.float32)}, "LoHa"),
        ({f"{FLAT}.lora_mid.weight": np.ones((2, 2, 3, 3), np.float32)}, "Tucker"),
        ({"something": np.ones(2, np.float32)}, "unknown tensor something"),
        ({f"{FLAT}.dora_scale": np.ones(4, np.float32)}, "DoRA"),
    ],
)
def test_what_no_plain_file_holds_is_refused(change, message, tmp_path):
    kohya(tmp_path / "x.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    safetensors.numpy.save_file(tensors | change, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "x.safetensors")


def test_torch_files_are_read_as_tensors_alone(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = save(tmp_path / "x", {"m.0.q": (4, 4)}, 0)
    own = tensors_of(path)
    (path / "adapter_model.safetensors").unlink()
    torch.save({key: torch.from_numpy(value) for key, value in own.items()}, path / "adapter_model.bin")
    a, b = read_adapter(path).modules["m.0.q"]
    np.testing.assert_array_equal(b @ a, dense(factors({"m.0.q": (4, 4)}, 0))["m.0.q"])
    torch.save({"m.0.q.lora_A.weight": list}, path / "adapter_model.bin")
    with pytest.raises(UserError, match="not a torch file of tensors alone"):
        read_adapter(path)


def test_torch_files_without_torch_name_the_remedy(tmp_path, monkeypatch):
    path = save(tmp_path / "x", {"m.0.q": (4, 4)}, 0)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    monkeypatch.setattr("enmp_jax.io.torch_files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install torch, or save the adapter again as safetensors"):
        read_adapter(path)


def test_a_tied_embedding_is_not_changed_for_both(tmp_path):
    path = save(tmp_path / "x", {"model.embed_tokens": (4, 11)}, 0)
    own = tensors_of(path)
    raw = {k.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"): v
           for k, v in own.items()}  # fmt: skip
    safetensors.numpy.save_file(raw, path / "adapter_model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    told = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(told))
    safetensors.numpy.save_file(
        {"model.embed_tokens.weight": np.zeros((11, 4), np.float32)}, base / "model.safetensors"
    )
    words = [
        "merge",
        "--adapter",
        f"x={path}",
        "--method",
        "sum",
        "--format",
        "checkpoint",
        "--base-model",
        str(base),
    ]
    assert cli.main([*words, "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
    (base / "config.json").write_text("{}")
    assert cli.main([*words, "--out", str(tmp_path / "o")]) == 0
    wanted = dense(factors({"p": (4, 11)}, 0))["p"].T
    np.testing.assert_allclose(load_all(tmp_path / "o")["model.embed_tokens.weight"], wanted, rtol=1e-5)
