# pyright: reportArgumentType=false, reportCallIssue=false
"""Racing: who drops out, what that costs, and that what stays scores as without a race."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.config import run_file
from enmp_jax.data import Examples, batch
from enmp_jax.deltas import Dense
from enmp_jax.devices.mesh import make_mesh
from enmp_jax.errors import UserError
from enmp_jax.evaluation import racing
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS, Fitness
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring, stack_heads
from enmp_jax.io.progress import SILENT
from enmp_jax.merges.base import Merge
from enmp_jax.models.base import Backbone
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.evolve import evolve
from enmp_jax.search import device_memo
from enmp_jax.search.device_memo import New
from enmp_jax.search.memo import Memo, front

TASKS, EACH, BATCH, RUNGS = 2, 64, 16, (0.125, 0.5, 1.0)
# the value of an example is the difference of the two logits that the table gives it
TABLE = Fitness("table", "table", lambda x, label, expert: x[:, 0] - x[:, 1])
ran: list[int] = []


def features(table, inputs, deltas):
    """What the table has for a member, and one more forward pass."""
    member = deltas["member"].weight.reshape(())
    jax.debug.callback(lambda m: ran.append(int(m)), member)
    value = table[member.astype(int), inputs["number"]]
    return jnp.stack([value, jnp.zeros_like(value)], axis=1)


BACKBONE = Backbone(*[None] * len(Backbone.__annotations__))._replace(features=features)
MERGE = Merge(  # a "scale" is a row of the table
    lambda stack: None, lambda ingredients, keep, scale: {"member": Dense(jnp.reshape(scale, (1, 1, 1)))}
)


def batches(order="stratified", sizes=(EACH,) * TASKS):
    starts = np.cumsum([0, *sizes])
    return batch(
        [
            Examples({"number": np.arange(a, a + n)}, np.zeros(n, np.int32), (), np.zeros(n, "S1"))
            for a, n in zip(starts, sizes, strict=False)
        ],
        BATCH,
        order=order,
    )


def order():
    return np.asarray(batches()[0].inputs["number"]).reshape(-1)


def race(table, kind=TABLE, wanted=None, first=None, expert=(1.0, 1.0), importance=(1.0, 1.0), **options):
    """The race of the members of a table [member, example]."""
    table = np.asarray(table, np.float32)
    n = len(table)
    heads = stack_heads([(np.eye(2, dtype="f"), None)] * TASKS)
    inputs = EvalInputs(jnp.asarray(table), (), heads, batches())
    scoring = Scoring(*(jnp.asarray(x, jnp.float32) for x in ((EACH,) * TASKS, expert, expert, importance)))
    run = racing.make_race(
        BACKBONE, MERGE, TASKS, make_mesh(devices=jax.devices()[:1]), 2, kind, RUNGS, **options
    )
    new = New(
        jnp.ones(n, bool) if wanted is None else jnp.asarray(wanted),
        jnp.arange(n) if first is None else jnp.asarray(first),
    )
    ran.clear()
    scored = jax.jit(run)(new, jnp.ones((n, 1, 1)), jnp.arange(n, dtype=jnp.float32), inputs, scoring)
    jax.effects_barrier()
    return scored


def tempting(errors):
    """A leader and a member that is behind by so many standard errors on the first rung, and best on all."""
    random = np.random.default_rng(0)
    leader = random.normal(size=TASKS * EACH) + 1
    seen, difference = order()[:BATCH], np.full(TASKS * EACH, 0.5)
    noise = np.tile([1.0, -1.0], BATCH // 2)[np.argsort(seen // EACH, kind="stable").argsort()]
    # per task 8 examples, half of them 1 above and half 1 below: a standard deviation of sqrt(8 / 7)
    error = np.sqrt(8 / 7 / BATCH * (1 - 1 / 8))
    difference[seen] = noise - errors * error
    return np.stack([leader, leader + difference])


@pytest.mark.parametrize(("errors", "wins"), [(2.9, True), (3.1, False)])
def test_a_member_that_is_behind_by_less_than_three_errors_stays(errors, wins):
    """And wins, being the best on all examples; a little more and it drops out."""
    table = tempting(errors)
    assert table.mean(1).argmax() == 1
    scored = race(table)
    assert (int(scored.fitness.argmax()) == 1) == wins == bool(scored.final[1])
    if wins:
        assert scored.fitness[1] == pytest.approx(table[1].mean(), rel=1e-6)


def close(ahead):
    """Members that are ahead by so much, and noise that hides small differences."""
    random = np.random.default_rng(3)
    hard = random.normal(size=TASKS * EACH)
    return hard + random.normal(size=(len(ahead), TASKS * EACH)) + np.asarray(ahead, float)[:, None]


def test_a_hopeless_member_is_run_on_the_first_rung_only():
    scored = race(close([0, 0, -5]))
    assert scored.details.cost.tolist() == [1, 1, 0.125] and scored.final.tolist() == [True, True, False]
    # 8 batches of the two; one of the third, which also fills up its chunk of two
    assert sorted(ran) == [0] * 8 + [1] * 8 + [2] * 2
    assert scored.fitness[2] < scored.fitness[:2].min() and np.isfinite(scored.fitness[2])


def test_nothing_drops_out_after_a_handful_of_examples(monkeypatch):
    """The first rung has 8 examples of each task."""
    monkeypatch.setattr(racing, "LEAST_EXAMPLES", 9)
    assert race(close([0, 0, -5])).details.cost.tolist() == [1, 1, 0.5]


def tables(n=8, seed=0, spread=0.15):
    random = np.random.default_rng(seed)
    hard = random.normal(size=TASKS * EACH)
    return hard + random.normal(size=(n, 1)) * spread + random.normal(size=(n, TASKS * EACH)) * 0.3 - 1


@pytest.mark.parametrize("kind", [TABLE, TABLE._replace(logarithmic=True)], ids=["linear", "logarithmic"])
def test_without_a_limit_a_race_is_no_race(kind):
    table = tables()
    scored = race(table, kind, expert=(0.9, 0.7), importance=(1.0, 3.0), z=np.inf)
    by_task = table.reshape(len(table), TASKS, EACH).mean(2)
    own = np.exp(by_task - [0.9, 0.7]) if kind.logarithmic else by_task / [0.9, 0.7]
    np.testing.assert_allclose(scored.fitness, own @ [0.25, 0.75], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scored.details.worst, own.min(1), rtol=1e-5)
    assert scored.final.all() and (scored.details.cost == 1).all()


@pytest.mark.parametrize("kind", [TABLE, TABLE._replace(logarithmic=True)], ids=["linear", "logarithmic"])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_survivors_are_right(kind, seed):
    """Who stayed in longer is ranked higher, the best is the best of all, and fitness of all is exact."""
    table = tables(12, seed)
    scored, whole = race(table, kind), race(table, kind, z=np.inf)
    fitness, cost = np.asarray(scored.fitness), np.asarray(scored.details.cost)
    assert set(cost.tolist()) == {0.125, 0.5, 1.0}
    for low, high in ((0.125, 0.5), (0.5, 1.0)):
        assert fitness[cost == low].max() < fitness[cost == high].min()
    full = np.asarray(scored.final)
    np.testing.assert_array_equal(full, cost == 1)
    np.testing.assert_allclose(fitness[full], whole.fitness[full], rtol=1e-6)
    assert fitness.argmax() == np.asarray(whole.fitness).argmax()
    assert len(set(fitness)) == len(fitness)  # those lowered together keep their order


def test_members_lowered_below_the_survivors_keep_their_order():
    """Survivors can turn out worse, on all examples, than what dropped out earlier seemed to be."""
    table = close([0, 0, -5])
    late = np.setdiff1d(np.arange(TASKS * EACH), order()[:BATCH])
    table[:2, late] -= 20  # the two that stay are bad at everything that comes later
    table = np.concatenate([table, table[2:] + 0.5])
    scored = race(table)
    assert scored.details.cost.tolist() == [1, 1, 0.125, 0.125]
    assert scored.fitness[2] < scored.fitness[3] < scored.fitness[:2].min()
    assert scored.fitness[3] - scored.fitness[2] == pytest.approx(0.5, abs=1e-4)


def test_a_broken_member_drops_out_at_once_and_for_good():
    table = close([0, 0, 0, 0])
    table[1, order()[3]] = np.nan
    table[2, order()[-3]] = np.nan  # on the last rung
    scored = race(table)
    assert np.isnan(scored.fitness).tolist() == [False, True, True, False]
    assert scored.final.tolist() == [True, True, True, True] and scored.details.cost[1] == 0.125


def test_every_search_has_its_own_race_and_copies_are_run_once():
    """The second search is worse than the first, and the best of it is a copy of what dropped out there."""
    table = np.concatenate([tables(1)] * 6) + np.asarray([0, -2, -3, -2, -4, -5])[:, None]
    table += np.random.default_rng(5).normal(size=table.shape) * 0.1
    table[3] = table[1]
    scored = race(table, first=[0, 1, 2, 1, 4, 5], searches=2)
    assert scored.details.cost.tolist() == [1, 1, 0.125, 0, 0.125, 0.125]
    assert scored.final.tolist() == [True, True, False, True, False, False]
    assert scored.fitness[3] == scored.fitness[1] == pytest.approx(table[1].mean(), rel=1e-5)
    remembered = race(table, wanted=[False, True, True, True, True, True], first=[0, 1, 2, 1, 4, 5])
    assert remembered.details.cost[0] == 0 and remembered.final[1]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_standard_errors_are_those_of_repeated_samples(logarithmic):
    """The spread of the difference of two members over many random samples of half of the examples."""
    table, kind = tables(2, spread=0.5), TABLE._replace(logarithmic=logarithmic)
    expert, importance, n = np.asarray([0.9, 0.7]), np.asarray([1.0, 3.0]), EACH // 2
    scoring = Scoring(*(jnp.asarray(x, jnp.float32) for x in ((EACH,) * 2, expert, expert, importance)))
    random, task = np.random.default_rng(1), np.repeat(np.arange(TASKS), EACH)
    differences, errors = [], []
    for i in range(2000):
        chosen = np.concatenate([random.permutation(EACH)[:n] + EACH * t for t in range(TASKS)])
        mean = table[:, chosen].reshape(2, TASKS, n).mean(2)
        own = np.exp(mean - expert) if logarithmic else mean / expert
        differences.append(np.subtract(*(own @ importance / importance.sum())))
        if i < 20:
            member = np.zeros((len(task), TASKS), np.float32)
            member[chosen, task[chosen]] = 1
            seen = racing.Seen(jnp.asarray(member), jnp.full(TASKS, n * 1.0), jnp.full(TASKS, 0.5))
            rows = jnp.asarray(np.where(member.any(1), table, 0), jnp.float32)
            given = rows, jnp.asarray(mean * n), jnp.asarray(own), jnp.zeros(2, int), seen, scoring, kind
            errors.append(racing.standard_errors(*given))
    assert np.asarray(errors)[:, 0].max() == 0
    assert np.mean(errors, axis=0)[1] == pytest.approx(np.std(differences), rel=0.1)


def test_every_beginning_of_the_batches_is_stratified():
    sizes = (40, 17, 3)
    (made,), (given,) = batches(sizes=sizes), batches("given", sizes)
    task, mask = (np.asarray(x).reshape(-1) for x in (made.task, made.mask))
    for rows in range(BATCH, 60, BATCH):
        share = np.bincount(task[:rows], minlength=3) / rows
        np.testing.assert_allclose(share, np.asarray(sizes) / 60, atol=1.5 / rows)
    number = np.asarray(made.inputs["number"]).reshape(-1)
    np.testing.assert_array_equal(np.sort(number[mask]), np.arange(60))
    assert (np.diff(number[task == 0]) < 0).any()  # drawn at random within a task
    np.testing.assert_array_equal(task[mask], np.repeat(np.arange(3), sizes)[number[mask]])
    np.testing.assert_array_equal(np.asarray(given.inputs["number"]).reshape(-1)[mask], np.arange(60))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"objective": "worst"}, "racing does not work with search.objective worst"),
        ({"objective": "pareto"}, "racing does not work with search.objective pareto"),
        ({"fitness": "calibrated"}, "racing does not work with search.fitness calibrated"),
        ({"strategy": "gradient"}, "compares masks, and search.strategy gradient has none"),
        ({"rungs": (0.5, 0.9)}, "rise to 1"),
        ({"rungs": (0.5, 0.5, 1.0)}, "rise to 1"),
        ({"rungs": (0.0, 1.0)}, "above 0"),
        ({"rungs": ()}, "rise to 1"),
    ],
)
def test_what_cannot_race_is_refused(demo_run, settings, line):
    search = dataclasses.replace(demo_run.search, fidelity="racing", **settings)
    with pytest.raises(UserError, match=line):
        run_file.check(dataclasses.replace(demo_run, search=search))


def searched(loaded, out, resume=False, **settings):
    search = dataclasses.replace(loaded.run.search, **settings)
    run = dataclasses.replace(loaded.run, search=search)
    evaluator = Evaluator(dataclasses.replace(loaded, run=run))
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    with RunDirectory(out, resume) as directory:
        directory.start(run)
        found = evolve(evaluator, directory, SILENT, inputs, scoring, 0.5)
    return found, [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()], evaluator


RACE = {
    "fidelity": "racing", "rungs": (0.5, 1.0), "strategy": "random", "sigma0": 2.0, "generations": 4,
    "max_pruned": 0.9, "finalists": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def raced(demo_loaded, tmp_path_factory):
    # two batches of 30; masks drop out from the first example on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "LEAST_EXAMPLES", 2)
        yield searched(demo_loaded, tmp_path_factory.mktemp("raced") / "whole", **RACE)


def test_a_search_with_races(raced):
    """Finalists are masks that were run on the whole split, with the fitness that they have there."""
    found, lines, evaluator = raced
    scoring = evaluator.scoring("search")
    for finalist in found.finalists:
        counts = evaluator.score(evaluator.inputs("search"), finalist.keep[None], np.full(1, 0.5, np.float32))
        exact = float(scoring.fitness(counts, evaluator.kind)[0])
        assert finalist.search == pytest.approx(exact, rel=1e-5)
    examples = int(evaluator.loaded.sizes("search").sum())
    spent = found.cost["example_evaluations"]
    assert lines[-1]["example_evaluations"] == spent
    # some ran on half of the 60 examples, the others on all
    assert spent % 30 == 0 and spent < found.cost["masks_run"] * examples
    assert max(f.search for f in found.finalists) == pytest.approx(lines[-1]["best"])
    assert lines[-1]["best"] == pytest.approx(max(max(line["fitness"]) for line in lines))


class Killed(Exception):
    """Stands for whatever ends a process."""


def test_races_go_on_after_a_resume(raced, demo_loaded, tmp_path, monkeypatch, compilations):
    """Killed after two generations; the estimates of those are not taken for what is known."""
    monkeypatch.setattr(racing, "LEAST_EXAMPLES", 2)
    told, out = RunDirectory.append_history, tmp_path / "run"

    def append(directory, record):
        if record["generation"] == 2:
            raise Killed
        told(directory, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_history", append)
        with pytest.raises(Killed):
            searched(demo_loaded, out, **RACE)
    assert compilations("advance") == 1
    start, known = device_memo.start, []
    monkeypatch.setattr(device_memo, "start", lambda *given: known.extend(given[4].tolist()) or start(*given))
    found, lines, _ = searched(demo_loaded, out, resume=True, **RACE)
    whole, expected, _ = raced
    assert lines == expected
    assert known and set(known) < {f.search for f in whole.finalists}
    same = ("example_evaluations", "masks_run", "distinct_masks")
    assert [found.cost[name] for name in same] == [whole.cost[name] for name in same]
    assert [f.search for f in found.finalists] == [f.search for f in whole.finalists]


def test_a_budget_counts_what_was_run(demo_loaded, tmp_path, monkeypatch):
    """It buys more generations with races than without, and is never exceeded."""
    monkeypatch.setattr(racing, "LEAST_EXAMPLES", 2)
    given = {**RACE, "generations": 9, "budget": 11 * 60, "x0": "auto"}
    found, lines, _ = searched(demo_loaded, tmp_path / "race", **given)
    _, plain, _ = searched(demo_loaded, tmp_path / "plain", **given | {"fidelity": "none"})
    assert found.cost["example_evaluations"] <= 11 * 60 and len(lines) > len(plain) == 2


def test_the_pareto_front_of_a_search(demo_loaded, tmp_path):
    given = {"objective": "pareto", "strategy": "random", "sigma0": 2.0, "max_pruned": 0.9}
    found, _, evaluator = searched(demo_loaded, tmp_path / "run", seeds=2, **given)
    points = found.cost["pareto"]
    mean, worst = ([p[name] for p in points] for name in ("mean", "worst"))
    assert mean == sorted(mean) and worst == sorted(worst, reverse=True)
    spec, scoring = evaluator.loaded.mask_spec, evaluator.scoring("search")
    for point in points:
        keep = spec.all_kept()
        for layer, task in point["pruned"]:
            keep[layer, evaluator.loaded.tasks.index(task)] = False
        counts = evaluator.score(evaluator.inputs("search"), keep[None], np.full(1, 0.5, np.float32))
        exact = [float(scoring.fitness(counts, evaluator.kind, name)[0]) for name in ("mean", "worst")]
        assert [point["mean"], point["worst"]] == pytest.approx(exact, rel=1e-5)
    assert max(mean) >= max((f.search for f in found.finalists), default=0) - 1e-6


def test_the_front_leaves_out_what_is_no_better_in_anything():
    memo, masks = Memo(), np.ones((6, 2, 2), bool)
    masks[1, 0, 0] = masks[2, 0, 1] = masks[3, 1, 0] = masks[4, 1] = masks[5, 0] = False
    mean = np.asarray([0.5, 0.7, 0.6, 0.65, 0.7, np.nan])
    worst = np.asarray([0.4, 0.1, 0.3, 0.2, 0.1, np.nan])
    memo.add(masks, mean, None, mean, worst)
    memo.add(masks[:1], mean[:1], None, mean[5:], worst[5:])  # remembered: known already
    found = front(memo.candidates())
    assert [(c.mean, c.worst) for c in found] == [(0.5, 0.4), (0.6, 0.3), (0.65, 0.2), (0.7, 0.1)]
    assert (~found[-1].keep).sum() == 1  # of two equals the one that prunes less
    assert front([]) == []


def test_racing_can_be_asked_for_with_every_other_fitness(demo_run):
    for name in set(FITNESS) - {"calibrated", "expert_hidden"}:  # refused: see test_rivals.py
        search = dataclasses.replace(demo_run.search, fidelity="racing", fitness=name)
        run_file.check(dataclasses.replace(demo_run, search=search))
