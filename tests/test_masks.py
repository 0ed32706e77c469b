"""Keep masks: decoding as the paper describes it, names and mask.json."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enmp_jax import masks
from enmp_jax.cli.merge import parse_prune
from enmp_jax.errors import UserError
from enmp_jax.lora import stack_adapters
from enmp_jax.masks import MaskSpec
from enmp_jax.runs import mask_file

TASKS = ("cars", "dtd", "sun397")


def make_stack(layers=4, missing=()):
    """Three adapters on two projections; ``missing`` lists (layer, projection, task)."""
    return stack_adapters(
        {
            task: {
                f"enc.{layer}.attn.{name}": (np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
                for layer in range(layers)
                for name in ("q_proj", "v_proj")
                if (layer, name, task) not in missing
            }
            for task in TASKS
        },
        n_layers=layers,
    )


def oracle(genes, k, threshold):
    """The paper, in plain Python: among the k largest genes prune those above the threshold."""
    order = sorted(range(len(genes)), key=lambda i: (-genes[i], i))
    return {i for i in order[:k] if genes[i] > threshold}


@settings(max_examples=60, deadline=None)
@given(
    genes=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=12, max_size=12),
    max_pruned=st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.99, 1.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5]),
)
def test_decode_is_top_k_above_threshold(genes, max_pruned, threshold):
    spec = MaskSpec.of(make_stack(), max_pruned=max_pruned, threshold=threshold)
    keep = np.asarray(spec.decode(jnp.asarray(genes, jnp.float32)))
    assert keep.shape == (4, 3)
    assert set(np.flatnonzero(~keep)) == oracle(genes, int(max_pruned * 12), threshold)


def test_decode_orders_as_layer_then_task():
    spec = MaskSpec.of(make_stack(), max_pruned=0.2)
    genes = np.full(12, -1.0, np.float32)
    genes[[5, 10]] = 1.0
    assert spec.pruned_modules(np.asarray(spec.decode(jnp.asarray(genes)))) == [(1, "sun397"), (3, "dtd")]


def test_extremes_of_max_pruned():
    genes = jnp.ones(12)
    assert MaskSpec.of(make_stack(), max_pruned=0.0).decode(genes).all()
    assert not MaskSpec.of(make_stack(), max_pruned=1.0).decode(genes).any()
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"max_pruned.*0\.\.1"):
            MaskSpec.of(make_stack(), max_pruned=bad)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_missing_modules_have_no_gene_and_are_never_pruned(granularity):
    gone = [(1, "q_proj", "dtd"), (1, "v_proj", "dtd"), (2, "q_proj", "cars")]
    spec = MaskSpec.of(make_stack(missing=gone), granularity, max_pruned=1.0)
    # a (layer, task) exists as long as one of its projections does
    assert spec.n_modules == (11 if granularity == "layer" else 21)
    assert spec.genome_size == spec.max_count == spec.n_modules
    keep = np.asarray(spec.decode(jnp.ones(spec.genome_size)))
    assert np.array_equal(~keep, spec.present())
    assert spec.n_pruned(keep) == spec.n_modules
    assert spec.n_pruned(np.zeros(spec.shape, bool)) == spec.n_modules
    assert len(spec.pruned_modules(np.zeros(spec.shape, bool))) == spec.n_modules


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_jit_is_eager_and_vmap_is_loop(granularity):
    spec = MaskSpec.of(make_stack(), granularity, max_pruned=0.4, search_scale=True)
    genomes = jax.random.normal(jax.random.key(0), (16, spec.genome_size))
    loop = np.stack([spec.decode(g) for g in genomes])
    assert np.array_equal(loop, jax.vmap(spec.decode)(genomes))
    assert np.array_equal(loop, jax.jit(jax.vmap(spec.decode))(genomes))
    assert len(np.unique(loop, axis=0)) > 1


def test_specs_of_equal_stacks_share_one_compilation():
    traced = []

    def decode(spec, genome):
        traced.append(spec)
        return spec.decode(genome)

    compiled = jax.jit(decode, static_argnums=0)
    for _ in range(2):
        compiled(MaskSpec.of(make_stack()), jnp.zeros(12))
    assert len(traced) == 1


def test_scale_gene():
    spec = MaskSpec.of(make_stack(), search_scale=True)
    assert spec.genome_size == 13
    start = spec.start(-1.0, scale=0.7)
    assert np.all(start[:12] == -1.0)
    assert float(spec.decode_scale(jnp.asarray(start), 9.0)) == pytest.approx(0.7, abs=1e-6)
    assert float(masks.decode_scale(jnp.asarray(1.0))) == pytest.approx(3 / (1 + np.exp(-1.0)), abs=1e-6)
    # the scale gene is not a module: however large, it takes no place in the top k
    genome = jnp.asarray([1.0] * 12 + [50.0])
    assert int(np.sum(~np.asarray(spec.decode(genome)))) == spec.max_count == 2
    fixed = MaskSpec.of(make_stack())
    assert fixed.genome_size == 12
    assert float(fixed.decode_scale(jnp.zeros(12), 0.25)) == 0.25


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_names_round_trip(granularity):
    stack = make_stack(missing=[(0, "q_proj", "dtd"), (0, "v_proj", "dtd")])
    spec = MaskSpec.of(stack, granularity, max_pruned=0.5)
    keep = np.asarray(spec.decode(jax.random.normal(jax.random.key(1), (spec.genome_size,))))
    assert spec.n_pruned(keep) > 2
    assert np.array_equal(spec.keep_from_pruned(spec.pruned_modules(keep)), keep)
    assert np.array_equal(spec.decode(jnp.asarray(spec.encode(keep))), keep)
    data = json.loads(json.dumps(spec.to_json(keep, 0.5)))
    saved = mask_file.from_json(data, stack)
    assert np.array_equal(saved.keep, keep)
    assert saved.scale == 0.5
    assert saved.spec.granularity == granularity


def test_masks_go_by_name_not_by_position():
    stack = make_stack()
    spec = MaskSpec.of(stack)
    keep = spec.keep_from_pruned([(0, "dtd"), (3, "cars")])
    other = stack.select([2, 0, 1])
    saved = mask_file.from_json(spec.to_json(keep, None), other)
    assert saved.scale is None
    assert sorted(saved.spec.pruned_modules(saved.keep)) == [(0, "dtd"), (3, "cars")]
    assert not np.array_equal(saved.keep, keep)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ((0, "car"), "unknown task 'car'; did you mean 'cars'"),
        ((0, "mnist"), "the tasks are: cars, dtd, sun397"),
        ((4, "cars"), r"layer 4 is not in 0\.\.3"),
        ((-1, "cars"), "layer -1"),
        (("0", "cars"), "layer '0'"),
        ((True, "cars"), "layer True"),
        ((0, "q_proj", "cars"), "give layer, task"),
        ("0:cars", "give layer, task"),
        ((1, "dtd"), "no LoRA there"),
    ],
)
def test_bad_modules(module, message):
    spec = MaskSpec.of(make_stack(missing=[(1, "q_proj", "dtd"), (1, "v_proj", "dtd")]))
    with pytest.raises(UserError, match=message):
        spec.keep_from_pruned([module])


def test_projections_by_the_end_of_their_name():
    spec = MaskSpec.of(make_stack(), "projection")
    full = spec.keep_from_pruned([(0, "enc.{}.attn.q_proj", "cars")])
    assert np.array_equal(full, spec.keep_from_pruned([(0, "attn.q_proj", "cars")]))
    assert spec.pruned_modules(full) == [(0, "enc.{}.attn.q_proj", "cars")]
    with pytest.raises(UserError, match="'proj' fits 0 of the projections"):
        spec.keep_from_pruned([(0, "proj", "cars")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["cars", "dtd"]}, "tasks cars, dtd, but the adapters given are cars, dtd, sun397"),
        ({"layers": 12}, "12 layers, but the adapters have 4"),
        ({"granularity": "block"}, "granularity 'block'"),
        ({"pruned": {"0": "cars"}}, "pruned must be a list"),
        ({"pruned": ["0:cars"]}, "like"),
        ({"pruned": [[9, "cars"]]}, "layer 9"),
        ({"scale": "big"}, "scale"),
    ],
)  # fmt: skip
def test_bad_mask_files(tmp_path, change, message):
    stack = make_stack()
    data = MaskSpec.of(stack).to_json(np.ones((4, 3), bool), 0.5)
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=message) as error:
        mask_file.load(path, stack)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_unreadable_mask_files(tmp_path):
    stack = make_stack()
    with pytest.raises(UserError, match="cannot read mask"):
        mask_file.load(tmp_path / "none.json", stack)
    path = tmp_path / "mask.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        mask_file.load(path, stack)
    path.write_text('{"granularity": "layer"}')
    with pytest.raises(UserError, match="'pruned' is missing"):
        mask_file.load(path, stack)


def test_parse_prune():
    assert parse_prune("0:dtd") == (0, "dtd")
    assert parse_prune("11:q_proj:dtd") == (11, "q_proj", "dtd")
    assert parse_prune("lm_head:dtd") == ("lm_head", "dtd")
    for bad in ("dtd", "0:", ":dtd", "0:a:b:c", ""):
        with pytest.raises(UserError, match="expected LAYER:TASK"):
            parse_prune(bad)
