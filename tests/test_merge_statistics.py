"""Statistics of the tasks' data, and the two methods that merge by them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generative_files import loaded_run, save_all
from safetensors.numpy import load_file

from enmp_jax import merges
from enmp_jax.cli.main import main
from enmp_jax.config.paths import SUITES
from enmp_jax.deltas import LowRank
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.statistics import measure
from enmp_jax.lora import stack_adapters
from enmp_jax.merges.statistics import write_statistics

NAME = "enc.{}.q_proj"
RANKS = ([2, 1, 0], [1, 2, 2])  # [layer][task]
IN, OUT, LAYERS, TASKS = 5, 4, 2, 3


@pytest.fixture(scope="module")
def stack():
    random = np.random.default_rng(0)
    adapters = {
        f"t{i}": {
            NAME.format(layer): (random.normal(size=(r, IN)), random.normal(size=(OUT, r)))
            for layer in range(LAYERS)
            if (r := RANKS[layer][i])
        }
        for i in range(TASKS)
    }
    return stack_adapters(adapters, dtype=jnp.float32)


def statistics(kind, rows=20):
    """{task: {module: matrix}} of random inputs or gradients, one input always zero."""
    random = np.random.default_rng(1)
    found = {}
    for i in range(TASKS):
        x = random.normal(size=(LAYERS, rows, IN)) * [1, 2, 3, 0.1, 0]
        own = np.einsum("lri,lrj->lij", x, x) / rows if kind == "gram" else random.random((LAYERS, OUT, IN))
        own = own.astype(np.float32)  # as they are stored
        found[f"t{i}"] = {NAME.format(layer): own[layer] for layer in range(LAYERS) if RANKS[layer][i]}
    return found


def merged(stack, keep, **merge):
    method = merges.make(**merge)
    (delta,) = method.merge(method.prepare(stack), jnp.asarray(keep, jnp.float32), 1.0).values()
    return np.asarray(delta.materialise())


KEEPS = [np.ones((LAYERS, TASKS)), np.array([[1, 0, 1], [0, 1, 1]]), np.array([[0, 0, 1], [1, 0, 0]])]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9])
def test_regmean_minimises_the_distance_of_outputs(stack, tmp_path, keep, off_diagonal):
    """Against the normal equations in numpy, inputs that are always zero left out."""
    write_statistics(tmp_path / "s.safetensors", "gram", found := statistics("gram"), {})
    ours = merged(
        stack, keep, method="regmean", statistics=str(tmp_path / "s.safetensors"), off_diagonal=off_diagonal
    )
    for layer in range(LAYERS):
        total, right = np.zeros((IN, IN)), np.zeros((IN, OUT))
        for i in range(TASKS):
            if keep[layer, i] and RANKS[layer][i]:
                gram = found[f"t{i}"][NAME.format(layer)].astype(float)
                gram = off_diagonal * gram + (1 - off_diagonal) * np.diag(np.diag(gram))
                pair = stack.pairs[NAME]
                total += gram
                right += gram @ np.asarray(pair.b[layer, i] @ pair.a[layer, i]).T
        expected = np.linalg.pinv(total, rcond=1e-12) @ right
        np.testing.assert_allclose(ours[layer], expected.T, rtol=2e-4, atol=2e-5)  # the ridge


@pytest.mark.parametrize("keep", KEEPS)
def test_fisher_averages_entries_by_information(stack, tmp_path, keep):
    write_statistics(tmp_path / "s.safetensors", "fisher", found := statistics("fisher"), {})
    ours = merged(stack, keep, method="fisher", statistics=str(tmp_path / "s.safetensors"))
    for layer in range(LAYERS):
        over, under = np.zeros((OUT, IN)), np.zeros((OUT, IN))
        for i in range(TASKS):
            if keep[layer, i] and RANKS[layer][i]:
                f = found[f"t{i}"][NAME.format(layer)].astype(float)
                pair = stack.pairs[NAME]
                over += f / np.linalg.norm(f) * np.asarray(pair.b[layer, i] @ pair.a[layer, i])
                under += f / np.linalg.norm(f)
        expected = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
        np.testing.assert_allclose(ours[layer], expected, rtol=1e-4, atol=1e-5)  # the floor


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_members_batch_weights_have_a_gradient_and_one_task_alone_is_itself(stack, tmp_path, method):
    kind = {"regmean": "gram", "fisher": "fisher"}[method]
    write_statistics(tmp_path / "s.safetensors", kind, statistics(kind), {})
    merge = merges.make(method, statistics=str(tmp_path / "s.safetensors"))
    ingredients = merge.prepare(stack)
    keeps = jnp.asarray(np.stack(KEEPS), jnp.float32)

    def whole(keep):
        (delta,) = merge.merge(ingredients, keep, 1.0).values()
        return delta.materialise()

    together = jax.vmap(whole)(keeps)
    for one, keep in zip(together, keeps, strict=True):
        np.testing.assert_allclose(one, whole(keep), rtol=1e-5, atol=1e-6)  # entries up to 6, some cancel
    pair = stack.pairs[NAME]
    alone = whole(jnp.asarray([[0, 1, 0], [0, 1, 0]], jnp.float32))
    if method == "fisher":
        np.testing.assert_allclose(alone, jnp.matmul(pair.b[:, 1], pair.a[:, 1]), atol=1e-9)
    assert not np.asarray(whole(jnp.zeros((LAYERS, TASKS)))).any()
    gradient = jax.grad(lambda keep: (whole(keep) ** 2).sum())(keeps[0])
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


@pytest.fixture
def seen(monkeypatch):
    """Inputs of every delta that reaches 16 inputs from 24, as they pass: an independent witness."""
    found: list[np.ndarray] = []
    plain = LowRank.apply

    def watched(self, x):
        jax.debug.callback(lambda value: found.append(np.asarray(value)), x, ordered=True)
        return plain(self, x)

    monkeypatch.setattr(LowRank, "apply", watched)
    return found


def test_gram_of_images_is_that_of_the_inputs_that_pass(demo_loaded, seen):
    """One projection of one task, whose inputs are recorded as the model runs."""
    name = sorted(demo_loaded.stack.pairs)[0]
    pairs = {name: demo_loaded.stack.pairs[name]}
    loaded = dataclasses.replace(
        demo_loaded,
        adapters=dataclasses.replace(
            demo_loaded.adapters, stack=dataclasses.replace(demo_loaded.stack, pairs=pairs)
        ),
    )
    evaluator = Evaluator(loaded)
    found = measure(evaluator, "gram", "selection")
    jax.effects_barrier()
    layers = loaded.stack.n_layers
    size = len(loaded.examples["selection"][0].labels)
    assert size < loaded.run.evaluation.batch_size  # one batch a task, its last rows are copies
    for i, task in enumerate(loaded.tasks):
        for layer in range(layers):
            x = seen[i * layers + layer][:size].astype(np.float64)
            rows = x.reshape(-1, x.shape[-1])
            np.testing.assert_allclose(
                found[task][name][layer], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
            )


def test_fisher_is_the_mean_squared_gradient_with_respect_to_the_weight(demo_loaded):
    """Against gradients of the model with the adapter added to the base weights."""
    loaded = demo_loaded
    found = measure(Evaluator(loaded), "fisher", "selection")
    name, task = "vision_model.encoder.layers.{}.self_attn.q_proj", 1
    name = next(n for n in loaded.stack.pairs if n.endswith("q_proj"))
    examples, heads = loaded.examples["selection"][task], loaded.heads
    alone = merges.make("sum")
    keep = np.eye(len(loaded.tasks))[[task] * loaded.stack.n_layers]
    deltas = alone.merge(alone.prepare(loaded.stack), keep, 1.0)
    left, core, right = deltas[name].left, deltas[name].core, deltas[name].right

    def log_likelihood(weight, image, label):
        given = {**deltas, name: LowRank(jnp.eye(weight.shape[1]) + 0 * left[:, :, :1], weight, None)}
        given[name] = LowRank(
            jnp.broadcast_to(jnp.eye(weight.shape[1]), (len(weight), *[weight.shape[1]] * 2)), weight, None
        )
        features = loaded.backbone.features(loaded.params, {"image": image[None]}, given)[0]
        if heads.normalise:
            features = features / jnp.linalg.norm(features)
        logits = heads.weight[task] @ features * heads.logit_scale[task] + heads.bias[task]
        return jax.nn.log_softmax(jnp.where(heads.allowed[task], logits, -jnp.inf))[label]

    weight = jnp.matmul(jnp.matmul(left, core), right)
    gradients = jax.vmap(jax.grad(log_likelihood), (None, 0, 0))(
        weight, jnp.asarray(examples.inputs["image"]), jnp.asarray(examples.labels)
    )
    np.testing.assert_allclose(found[loaded.tasks[task]][name], (gradients**2).mean(0), rtol=2e-3, atol=1e-9)


def test_padding_of_texts_does_not_count(tmp_path, seen):
    """Tasks of choices and completions, whose rows have different lengths."""
    save_all(tmp_path)
    loaded = load(loaded_run(tmp_path))
    found = measure(Evaluator(loaded), "gram", "search")
    jax.effects_barrier()
    tokens = sum(int(e.inputs["attention_mask"].sum()) for e in loaded.examples["search"])
    assert tokens < sum(e.inputs["attention_mask"].size for e in loaded.examples["search"])
    # the inputs of the first layer's queries are normalised: a mean square of one a feature and token
    name = next(n for n in loaded.stack.pairs if n.endswith("q_proj"))
    for task in loaded.tasks:
        trace = np.trace(found[task][name][0])
        assert trace == pytest.approx(found[task][name].shape[-1], rel=0.02)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both kinds, from the command line."""
    path = tmp_path_factory.mktemp("statistics")
    for kind in ("gram", "fisher"):
        command = ["statistics", "demo", "--kind", kind, "--out", str(path / f"{kind}.safetensors")]
        assert main([*command, "--set", "evaluation.search_examples=8", "--quiet"]) == 0
    return path


SMALL = ("search_examples=8", "selection_examples=8", "test_examples=9")
SETTINGS = [word for value in SMALL for word in ("--set", f"evaluation.{value}")]


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_from_statistics_to_a_search_and_an_export(measured, tmp_path, capsys, method, kind):
    """A run file merges by them; what it hands over is verified; ``enmp merge`` makes the same of them."""
    (tmp_path / "run.yaml").write_text(
        "extends: demo\n"
        f"merge: {{method: {method}, statistics: {measured.name}/{kind}.safetensors, scale: 1.0}}\n"
        "search: {strategy: greedy, granularity: layer, population: 4, generations: 2, seeds: 1}\n"
    )
    (tmp_path / measured.name).symlink_to(measured)
    run = str(tmp_path / "run")
    assert main(["search", str(tmp_path / "run.yaml"), "--out", run, *SETTINGS, "--quiet"]) == 0
    mask = json.loads((tmp_path / "run" / "mask.json").read_text())
    assert mask["merge"]["method"] == method and mask["merge"]["statistics"].endswith(f"{kind}.safetensors")
    assert main(["export", run, "--format", "delta", "--out", str(tmp_path / "d")]) == 0
    folder = SUITES / "demo" / "adapters"
    adapters = [w for t in mask["tasks"] for w in ("--adapter", f"{t}={folder / t}")]
    assert main(["verify", str(tmp_path / "d"), *adapters]) == 0
    capsys.readouterr()
    merge = ["merge", *adapters, "--mask", str(tmp_path / "run" / "mask.json"), "--out", str(tmp_path / "m")]
    assert main(merge) == 0, capsys.readouterr().err
    one, two = (load_file(tmp_path / x / "delta.safetensors") for x in ("d", "m"))
    assert set(one) == set(two) and any(np.abs(x).max() > 0 for x in one.values())
    for key, value in one.items():
        np.testing.assert_allclose(value, two[key], atol=1e-6)


def refused(capsys, *args):
    assert main([str(a) for a in args]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x]
    return line


def test_bad_input_is_one_line(measured, tmp_path, stack, capsys):
    for given, said in (
        ({"method": "regmean"}, "needs statistics of the tasks' data: enmp statistics RUN.yaml --kind gram"),
        ({"method": "tsv", "statistics": "x"}, "tsv needs no statistics"),
        ({"method": "regmean", "statistics": "x", "space": "core"}, "statistics are those of full matrices"),
        ({"method": "regmean", "statistics": "x", "off_diagonal": 1.0}, "off_diagonal is 1.0"),
    ):
        with pytest.raises(UserError, match=said):
            merges.make(**given)
    gram = str(measured / "gram.safetensors")
    with pytest.raises(UserError, match=r"holds gram statistics, and fisher is needed"):
        merges.make("fisher", statistics=gram).prepare(stack)
    with pytest.raises(UserError, match=r"says nothing of enc.0.q_proj of 't0': measured for other adapters"):
        merges.make("regmean", statistics=gram).prepare(stack)
    with pytest.raises(UserError, match=r"there is no none.safetensors"):
        merges.make("regmean", statistics=str(tmp_path / "none.safetensors")).prepare(stack)
    wrong = {t: {m: x[:3, :3] for m, x in own.items()} for t, own in statistics("gram").items()}
    write_statistics(tmp_path / "w.safetensors", "gram", wrong, {})
    with pytest.raises(UserError, match=r"is \(3, 3\), not \(5, 5\): measured for another base"):
        merges.make("regmean", statistics=str(tmp_path / "w.safetensors")).prepare(stack)
    missing = ("--set", "merge.method=regmean", "--set", "merge.statistics=none.safetensors")
    line = refused(capsys, "search", "demo", *missing, "--out", tmp_path / "never")
    assert "there is no file none.safetensors" in line and not (tmp_path / "never").exists()
    line = refused(capsys, "statistics", "demo", "--kind", "gram", "--out", gram)
    assert "already there" in line
    line = refused(capsys, "statistics", "demo", "--kind", "gram", "--out", tmp_path / "here")
    assert "ends in .safetensors" in line
