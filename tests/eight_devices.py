# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Tests that need 8 devices; test_devices.py runs this file in a process of its own."""

import dataclasses
import json
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

# ruff: noqa: E402
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import TASKS, make_inputs, masks
from generative_files import loaded_run, save_all
from jax.sharding import NamedSharding, PartitionSpec

from enmp_jax import merges, models
from enmp_jax.config.sections import MergeConfig
from enmp_jax.data.batches import Batches
from enmp_jax.devices.mesh import choose_shape, make_mesh
from enmp_jax.evaluation import budget, racing
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.population import EvalInputs, count_all, make_evaluate, place
from enmp_jax.evaluation.prefix import make_evaluate_from
from enmp_jax.evaluation.scoring import Heads, Scoring
from enmp_jax.io.progress import SILENT
from enmp_jax.lora import LoraPair, LoraStack
from enmp_jax.masks import MaskSpec
from enmp_jax.models import causal
from enmp_jax.models.sharding import shard_params
from enmp_jax.runs.search import search_run
from enmp_jax.search import device_memo, loop, strategies

COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
EVERY = [(p, d, 8 // (p * d)) for p in (1, 2, 4, 8) for d in (1, 2, 4, 8) if 8 % (p * d) == 0]
SHAPES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), *EVERY]  # 1, 2 and 4 devices, and every mesh of 8


@pytest.fixture(scope="module")
def problem():
    return make_inputs()


@pytest.fixture(scope="module")
def expected(problem):
    """64 masks, one at a time, on one device."""
    backbone, merge, _, inputs = problem
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), member_chunk=1))
    return evaluate(inputs, *map(jnp.asarray, masks(64)))


def scores_on(problem, shape, size, **options):
    backbone, merge, _, inputs = problem
    mesh = make_mesh(*shape)
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), mesh, **options))
    keep, scale = masks(64)
    return evaluate(place(inputs, mesh, backbone), keep[:size], scale[:size])


def assert_scores(counts, expected, size):
    np.testing.assert_array_equal(counts.correct, expected.correct[:size])
    np.testing.assert_allclose(counts.log_likelihood, expected.log_likelihood[:size], rtol=1e-6)


def test_the_problem_tells_masks_apart(expected):
    assert len({tuple(row) for row in np.asarray(expected.correct)}) > 8
    assert np.ptp(np.asarray(expected.log_likelihood), axis=0).min() > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_do_not_depend_on_the_mesh(problem, expected, shape):
    assert_scores(scores_on(problem, shape, 7), expected, 7)


@pytest.mark.parametrize(
    ("size", "shape"), [(1, (8, 1, 1)), (8, (8, 1, 1)), (64, (8, 1, 1)), (64, (2, 2, 2))]
)
def test_any_population_size(problem, expected, size, shape):
    assert_scores(scores_on(problem, shape, size), expected, size)


def test_dense_deltas_in_chunks_on_a_mesh():
    problem = make_inputs("ties")
    backbone, merge, _, inputs = problem
    one = jax.jit(make_evaluate(backbone, merge, len(TASKS), member_chunk=1))
    expected = one(inputs, *(jnp.asarray(x[:16]) for x in masks(64)))
    assert_scores(scores_on(problem, (2, 2, 2), 16, member_chunk=3), expected, 16)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_scores_from_a_parent_do_not_depend_on_the_mesh(problem, shape):
    """9 masks that start at every layer, on meshes that do not divide them."""
    backbone, merge, _, inputs = problem
    parent = masks(1)[0][0]
    keep = np.concatenate([parent[None], parent ^ np.eye(6, dtype=bool).reshape(6, 2, 3), masks(2)[0]])
    whole = jax.jit(make_evaluate(backbone, merge, len(TASKS), member_chunk=1))
    expected = whole(inputs, keep, np.full(9, 0.5, np.float32))
    mesh = make_mesh(*shape)
    evaluate = jax.jit(make_evaluate_from(backbone, merge, len(TASKS), mesh, member_chunk=2))
    assert_scores(evaluate(place(inputs, mesh, backbone), parent, 0.5, keep), expected, 9)


def compiled_text(problem, shape):
    backbone, merge, _, inputs = problem
    mesh = make_mesh(*shape)
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), mesh))
    return str(evaluate.lower(place(inputs, mesh, backbone), *masks(16)).compile().as_text())


def test_the_only_communication_is_the_last_step(problem):
    """One gather of all counts; nothing in the loops over batches and layers."""
    text = compiled_text(problem, (8, 1, 1))
    found = [line for line in text.splitlines() if re.search(COLLECTIVES, line)]
    assert len(found) == 1, found
    assert " all-gather" in found[0] and f"f32[16,{3 * len(TASKS)}]" in found[0], found
    entry = text[text.index("\nENTRY ") :]
    assert all(line in entry for line in found)  # not in the body of a loop
    # a sharded model does communicate: the search above would have seen it
    assert len(re.findall(COLLECTIVES, compiled_text(problem, (1, 1, 8)))) > 2


def test_base_weights_are_divided_over_the_model_axis(problem):
    inputs = place(problem[-1], make_mesh(1, 2, 4), problem[0])
    q = next(v for k, v in inputs.params["layers"].items() if k == "q")["weight"]
    down = inputs.params["layers"]["down"]["weight"]
    assert q.sharding.shard_shape(q.shape) == (2, 4, 16)
    assert down.sharding.shard_shape(down.shape) == (2, 16, 8)
    label = inputs.batches[0].label
    assert label.sharding.shard_shape(label.shape) == (label.shape[0], label.shape[1] // 2)


@pytest.mark.parametrize(
    ("devices", "population", "batch_size", "model", "shape"),
    [
        (8, 16, 64, 1, (8, 1)), (8, 7, 64, 1, (8, 1)), (8, 4, 64, 1, (4, 2)), (8, 1, 64, 1, (1, 8)),
        (8, 16, 64, 4, (2, 1)), (8, 9, 64, 1, (2, 4)), (8, 9, 63, 1, (8, 1)), (6, 8, 64, 1, (3, 2)),
        (1, 16, 64, 1, (1, 1)),
    ],
)  # fmt: skip
def test_the_mesh_that_is_chosen(devices, population, batch_size, model, shape):
    chosen = choose_shape(devices, population, batch_size, model)
    assert (chosen["population"], chosen["data"], chosen["model"]) == (*shape, model)


LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
}  # fmt: skip


def abstract_problem(mesh, dtype, tasks=6, rank=16, rows=8, tokens=128, **changes):
    """Llama-3-8B with six adapters as shapes and shardings: nothing is allocated."""
    backbone, merge = models.build(LLAMA_3_8B | changes, dtype), merges.make("mean")

    def on(x, spec=()):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    n = backbone.n_layers
    pairs = {
        name: LoraPair(struct(n, tasks, rank, inner), struct(n, tasks, out, rank), ((rank,) * tasks,) * n)
        for name, (out, inner) in backbone.modules.items()
    }
    names = tuple("abcdefgh"[:tasks])
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shard_params(backbone, mesh)
    )
    ingredients = jax.eval_shape(merge.prepare, LoraStack(pairs, names))
    ids, flat = struct(2, rows, tokens, dtype=jnp.int32), struct(2, rows, dtype=jnp.int32)
    batches = Batches({"input_ids": ids, "attention_mask": ids}, flat, flat, struct(2, rows, dtype=jnp.bool_))
    width = backbone.width
    heads = Heads(
        struct(tasks, 3, width), struct(tasks, 3), struct(tasks, 3, dtype=jnp.bool_), struct(tasks), False
    )
    ingredients, heads = jax.tree.map(on, (ingredients, heads))
    batches = jax.tree.map(lambda x: on(x, (None, "data")), batches)
    return backbone, merge, EvalInputs(params, ingredients, heads, (batches,))


def compile_abstract(mesh, backbone, merge, inputs, members, tasks=6, chunk=None):
    evaluate = make_evaluate(backbone, merge, tasks, mesh, chunk)
    keep = jax.ShapeDtypeStruct((members, backbone.n_layers, tasks), jnp.bool_)
    scale = jax.ShapeDtypeStruct((members,), jnp.float32)
    return jax.jit(evaluate).lower(inputs, keep, scale).compile()


def test_llama_3_8b_on_eight_devices():
    """2 x 1 x 4: each device has a quarter of the base weights and never gathers them."""
    mesh = make_mesh(2, 1, 4)
    backbone, merge, inputs = abstract_problem(mesh, "bfloat16")
    memory = compile_abstract(mesh, backbone, merge, inputs, 4).memory_analysis()
    whole = budget.n_bytes(jax.eval_shape(backbone.init, jax.random.key(0)))
    assert whole > 15e9
    shared = budget.n_bytes((inputs.ingredients, inputs.heads, inputs.batches))
    shared -= budget.n_bytes(inputs.params["lm_head"])  # classifiers do not use it: the compiler drops it
    assert memory.argument_size_in_bytes == pytest.approx(whole / 4 + shared, rel=0.01)
    # nor does it make copies of its own: a layer at a time is read, and multiplied as bfloat16
    assert memory.temp_size_in_bytes < 0.5 * whole / 4


def test_a_gradient_of_llama_3_8b_fits_what_the_plan_says():
    """1 x 2 x 4: the derivative of a fitness with respect to weights of 32 x 6 modules."""
    mesh = make_mesh(1, 2, 4)
    backbone, merge, inputs = abstract_problem(mesh, "bfloat16")

    def value(weights, inputs, scoring):
        deltas = merge.merge(inputs.ingredients, weights, 0.5)
        counts = count_all(backbone, inputs, deltas, 6, FITNESS["margin"], remat=True)
        return scoring.fitness(counts, FITNESS["margin"])

    weights = jax.ShapeDtypeStruct((backbone.n_layers, 6), jnp.float32)
    scoring = Scoring(*[jax.ShapeDtypeStruct((6,), jnp.float32)] * 4)
    memory = jax.jit(jax.grad(value)).lower(weights, inputs, scoring).compile().memory_analysis()
    own, _ = budget.delta_bytes(merge, inputs.ingredients, (backbone.n_layers, 6))
    planned = budget.backward_bytes(backbone, inputs.batches) + 2 * own
    assert memory.temp_size_in_bytes < 1.05 * planned
    # and the plan is no wild overestimate
    assert planned < 2 * memory.temp_size_in_bytes


def test_sixteen_members_of_llama_3_8b_answer_in_little_more_than_one():
    """1 x 2 x 4, all members together: peak memory, logits over 128,256 tokens included."""
    mesh = make_mesh(1, 2, 4)
    backbone, merge, inputs = abstract_problem(mesh, "bfloat16")
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    sizes = {"input_ids": 128, "attention_mask": 128, "target_ids": 32, "target_from": 32}
    batch = {name: jax.ShapeDtypeStruct((8, n), jnp.int32, sharding=by_row) for name, n in sizes.items()}

    def evaluate(params, ingredients, keep, batch):
        def member(keep):
            deltas = merge.merge(ingredients, keep, 0.5)
            return causal.answer_log_probabilities(backbone, params, batch, deltas)

        return jax.vmap(member)(keep)

    def peak(members):
        keep = jax.ShapeDtypeStruct((members, backbone.n_layers, 6), jnp.bool_)
        compiled = jax.jit(evaluate).lower(inputs.params, inputs.ingredients, keep, batch).compile()
        memory = compiled.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    core, _ = budget.delta_bytes(merge, inputs.ingredients, (backbone.n_layers, 6))
    assert peak(16) - 16 * core < 1.1 * peak(1)


def test_members_add_their_cores_and_no_weights():
    """16 masks against 1, at the widths of Llama-3-8B (2 layers, float32)."""
    mesh = make_mesh(1, 1, 1)
    backbone, merge, inputs = abstract_problem(mesh, "float32", rows=1, tokens=8, num_hidden_layers=2)
    members, base = 16, budget.n_bytes(inputs.params["layers"])
    core, dense = budget.delta_bytes(merge, inputs.ingredients, (2, 6))
    assert not dense and core * members < base / 20

    def temp(n, chunk):
        compiled = compile_abstract(mesh, backbone, merge, inputs, n, chunk=chunk)
        return compiled.memory_analysis().temp_size_in_bytes

    one = temp(1, 1)
    assert temp(members, 1) - one < members * core  # one after the other
    batch = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in inputs.batches[0].inputs.items()}
    activations = budget.activation_bytes(backbone, batch)
    # together: a core and the activations of a layer each, twice (the layer's own and the carry)
    assert temp(members, members) - one < 2 * members * (core + activations) < base / 8


def test_a_generation_moves_nothing_between_host_and_device(problem):
    """Ask, decode, look up, evaluate, tell: all arguments on the mesh, nothing comes or goes; one program."""
    backbone, merge, stack, inputs = problem
    mesh = make_mesh(4, 2, 1)
    spec = MaskSpec.of(stack, max_pruned=0.5)
    evaluate = make_evaluate(backbone, merge, len(TASKS), mesh)
    traced = []

    def score(keep, scale, inputs):
        traced.append(keep.shape)
        fitness = evaluate(inputs, keep, scale).log_likelihood.sum(-1)
        return device_memo.Scored(fitness, jnp.ones(len(keep), bool))

    def fitness(genomes, memo, inputs):
        keep = jax.vmap(spec.decode)(genomes)
        remembering = device_memo.remembering(device_memo.once(score, 4))
        return remembering(memo, keep, jnp.ones(len(keep)), inputs)

    strategy = strategies.build("snes", spec.genome_size, 8, 1.0)
    replicated = NamedSharding(mesh, PartitionSpec())
    step = loop.make_step(strategy, fitness, 2, replicated)
    key, count = jax.device_put((jax.random.key(0), jnp.int32(2)), replicated)
    state = step.init(key, jax.device_put(jnp.full(spec.genome_size, 0.0), replicated))
    carried = jax.device_put((state, device_memo.start(64, spec.shape)), replicated)
    operands, starts = (
        (place(inputs, mesh, backbone),),
        jax.device_put([jnp.int32(2 * i) for i in range(3)], replicated),
    )
    carried, *_ = step.advance(key, starts[0], count, carried, operands)  # compiles
    with jax.transfer_guard("disallow"):
        for begin in starts[1:]:
            carried, _genomes, scores = step.advance(key, begin, count, carried, operands)
        jax.block_until_ready(scores)
        with pytest.raises(Exception, match=r"[Dd]isallowed"):
            step.advance(key, np.int32(0), count, carried, operands)
    assert traced == [(4, 2, len(TASKS))]
    assert np.isfinite(scores.fitness).all() and 8 <= int(carried[1].used) <= 48


def test_races_do_not_depend_on_the_mesh(problem, monkeypatch):
    """Two of three tasks' 7 examples are run first, and some masks drop out then."""
    monkeypatch.setattr(racing, "LEAST_EXAMPLES", 2)
    backbone, merge, _, inputs = problem
    keep, scale = masks(12)
    new = device_memo.New(jnp.arange(12) > 0, jnp.arange(12).at[5].set(2))
    keep[5], scale[5] = keep[2], scale[2]
    one = jnp.ones(len(TASKS))
    scoring = Scoring(7 * one, one, one, one)

    def scored(shape, **options):
        mesh, kind = make_mesh(*shape), FITNESS["probability"]
        race = racing.make_race(backbone, merge, len(TASKS), mesh, 2, kind, (0.3, 0.6, 1.0), 2, **options)
        return jax.jit(race)(new, keep, scale, place(inputs, mesh, backbone), scoring)

    expected = scored((1, 1, 1), z=1.0)
    assert expected.final.reshape(2, 6)[:, 1:].any(1).all()  # the leaders stay
    assert not expected.final[1:].all()
    for shape in [(8, 1, 1), (2, 2, 2)]:
        found = scored(shape, z=1.0)
        np.testing.assert_array_equal(found.final[1:], expected.final[1:])
        np.testing.assert_array_equal(found.details.cost, expected.details.cost)
        np.testing.assert_allclose(found.fitness[1:], expected.fitness[1:], rtol=1e-5)
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), kind=FITNESS["probability"]))
    whole = scoring.fitness(evaluate(inputs, keep, scale), FITNESS["probability"])
    np.testing.assert_allclose(scored((4, 2, 1), z=np.inf).fitness[1:], whole[1:], rtol=1e-5)


def test_choices_and_completions_do_not_depend_on_the_mesh(tmp_path):
    """Packed rows and rows of answers divided over ``data`` and ``model``, members over ``population``."""
    save_all(tmp_path)
    found = {}
    for shape in [(1, 1, 1), (2, 2, 2), (1, 4, 2)]:
        mesh = "{{population: {}, data: {}, model: {}}}".format(*shape)
        run = loaded_run(tmp_path, evaluation=f", mesh: {mesh}", search=", fitness: expert_kl")
        loaded = load(run, reporter=SILENT)
        evaluator, spec = Evaluator(loaded, lambda line: None), loaded.mask_spec
        keep = np.repeat(spec.all_kept()[None], 4, axis=0)
        keep.reshape(4, -1)[np.arange(1, 4), list(spec.slots)[:3]] = False
        found[shape] = evaluator.score(evaluator.inputs("search"), keep, np.full(4, 0.5, np.float32))
    expected = found.pop((1, 1, 1))
    assert len({tuple(row) for row in np.asarray(expected.value)}) == 4
    for counts in found.values():
        np.testing.assert_array_equal(counts.correct, expected.correct)
        np.testing.assert_allclose(counts.log_likelihood, expected.log_likelihood, rtol=1e-5)
        np.testing.assert_allclose(counts.value, expected.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [
        {"strategy": "gradient", "granularity": "projection"},
        {"strategy": "greedy", "start": "first_order"},
    ],
    ids=["gradient", "greedy"],
)
def test_a_whole_search_does_not_depend_on_the_devices(demo_run, tmp_path, strategy):
    """The same seed finds the same masks or weights, with the same history, on 1 device and on 8."""
    found = {}
    for shape in [(1, 1, 1), (2, 4, 1)]:
        mesh = dict(zip(("population", "data", "model"), shape, strict=True))
        run = dataclasses.replace(
            demo_run,
            merge=MergeConfig("tsv", scale=0.2),  # too small, so that other weights win
            search=dataclasses.replace(
                demo_run.search, generations=4, check_every=2, fitness="margin", **strategy
            ),
            # with the splits of this seed masks and weights both win on the selection split
            evaluation=dataclasses.replace(demo_run.evaluation, batch_size=16, mesh=mesh, seed=1),
        )
        out = tmp_path / "-".join(map(str, shape))
        search_run(run, out, SILENT)
        history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        found[shape] = json.loads((out / "mask.json").read_text()), history
    mask, history = found.pop((1, 1, 1))
    assert mask["pruned"] or mask.get("weights")  # something was found
    for other, lines in found.values():
        assert other["pruned"] == mask["pruned"]
        weights, expected = (
            {tuple(map(str, module)): weight for *module, weight in m.get("weights") or ()}
            for m in (other, mask)
        )
        assert weights == pytest.approx(expected, abs=1e-4)
        for line, expected in zip(lines, history, strict=True):
            assert line["best"] == pytest.approx(expected["best"], rel=1e-5)
            assert line["example_evaluations"] == expected["example_evaluations"]
