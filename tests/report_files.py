"""Run directories with made-up figures, as commands leave them."""

import json

import numpy as np
import yaml

TASKS = ("cars", "dtd", "sun397", "a <very> long task & name")


def make_run(path, seeds=1, granularity="layer", layers=12, tasks=TASKS, fitness="accuracy"):
    """A run directory as ``enmp search`` leaves it, with made-up figures."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(seeds):
        best = -np.inf
        for generation in range(20):
            values = 0.70 + 0.004 * generation + 0.02 * rng.normal(size=16)
            best = max(best, float(values.max()))
            record = {
                "seed": seed, "generation": generation, "masks_evaluated": 16 * (generation + 1),
                "distinct_masks": 15 * (generation + 1), "best": best, "mean": float(values.mean()),
                "fitness": [float(v) for v in values], "pruned": [3] * 16, "scale": [0.5] * 16,
            }  # fmt: skip
            lines.append(json.dumps(record))
    (path / "history.jsonl").write_text("\n".join(lines) + "\n")
    pruned = [[0, tasks[1]], [3, tasks[1]], [layers - 1, tasks[0]], [5, tasks[3]]]
    finer = {}
    if granularity == "projection":
        names = [f"enc.{{}}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        pruned = [[layer, name, task] for layer, task in pruned for name in names[: 1 + layer % 3]]
        finer = {"projections": names}
    mask = {
        "granularity": granularity,
        "pruned": pruned,
        "scale": 0.5,
        "tasks": list(tasks),
        "layers": layers,
    }
    (path / "mask.json").write_text(json.dumps(mask | finer))
    reference = {task: 0.85 + 0.02 * i for i, task in enumerate(tasks)}
    merged = {task: 0.8 * value - 0.03 * i for i, (task, value) in enumerate(reference.items())}
    enmp = {task: value + (0.05 if i else -0.01) for i, (task, value) in enumerate(merged.items())}
    mean = {
        k: float(np.mean([s[t] / reference[t] for t in tasks]))
        for k, s in (("merged", merged), ("enmp", enmp))
    }
    scores = {
        "split": "test", "tasks": list(tasks), "reference": reference, "base": dict.fromkeys(tasks, 0.1),
        "merged": merged, "enmp": enmp, "mean_normalised": mean, "pruned": pruned, "scale": 0.5, "seed": 0,
        "seeds": [
            {"seed": s, "mean_normalised": mean["enmp"], "gain": 0.05 - 0.01 * s, "pruned": 4,
             "search": 0.8, "selection": 0.79}
            for s in range(seeds)
        ],
        "gain": {"mean": 0.04, "std": 0.01 if seeds > 1 else None}, "modules": layers * len(tasks),
        "masks_evaluated": 320 * seeds, "distinct_masks": 300, "masks_per_second": 41.5,
        "scale_grid": {"0.4": 0.69, "0.5": 0.71},
        "splits": {
            which: dict.fromkeys(tasks, n)
            for which, n in (("search", 200.0), ("selection", 100.0), ("test", 400.0))
        },
    }  # fmt: skip
    (path / "scores.json").write_text(json.dumps(scores))
    data = {
        "source": "npz:digits.npz",
        "train": "train",
        "search": "search",
        "selection": "val",
        "test": "test",
    }
    config = {
        "base": {"model": "some/base", "dtype": "float32"},
        "tasks": [{"name": task, "adapter": f"adapters/{i}", "data": data} for i, task in enumerate(tasks)],
        "merge": {"method": "ties", "space": "full", "scale": "auto", "density": 0.4, "gamma": None},
        "search": {"strategy": "cma_es", "population": 16, "generations": 20, "fitness": fitness},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"enmp_jax": "0.1.0", "packages": {"jax": "0.10.2"}, "devices": ["cpu"], "cpu_count": 2}
    (path / "environment.json").write_text(json.dumps(environment))
    return path


GAIN = {"difference": 0.041, "low": 0.012, "high": 0.07, "p": 0.001}


def difference(value):
    return {"difference": value, "low": value - 0.02, "high": value + 0.02, "p": 0.1, "p_holm": 0.1}


def add_all(run, said="What was found is +4.1 points from the plain merge."):
    """What newer runs, ``enmp controls`` and ``enmp compare`` put beside the results."""

    def write(name, content):
        (run / name).write_text(json.dumps(content))

    mask, scores = (json.loads((run / name).read_text()) for name in ("mask.json", "scores.json"))
    tasks, places = mask["tasks"], [[name] for name in mask.get("projections", [])] or [[]]
    modules = [[layer, *place, task] for layer in range(mask["layers"]) for place in places for task in tasks]
    effects = [[*module, 0.001 * i - 0.01] for i, module in enumerate(modules)]
    write("effects.json", {"kind": "leave_one_out", "fitness": "accuracy", "effects": effects})
    write("seeds.json", {str(seed): {"pruned": mask["pruned"][seed:]} for seed in range(3)})
    own = {task: {"difference": 0.05, "low": -0.01, "high": 0.09, "p": 0.2} for task in tasks}
    answers = {task: {"merged": "0110", "enmp": "0111"} for task in tasks}
    write("test-answers.json", {"answers": answers, "gain": {"enmp": GAIN | {"tasks": own}}})
    found = {"search": 0.8, "selection": 0.76, "test": 0.74}
    on = {split: {"merged": 0.7, "enmp": value} for split, value in found.items()}
    write("scores.json", scores | {"fitness_on": on, "interval": {"enmp": GAIN}})
    write("fingerprints.json", {f"the test data of {task}": "abc" for task in tasks})
    head = {key: scores[key] for key in ("split", "tasks", "reference", "splits")}
    opposite = [[*module, -value] for *module, value in effects]
    rows = [
        {"row": "plain", "mean_normalised": 0.76, "values": [0.76]},
        {"row": "found", "mean_normalised": 0.8, "values": [0.8], "gain": GAIN | {"p_holm": 0.002}},
        {"row": "random masks", "mean_normalised": 0.75, "std": 0.01, "values": [0.75] * 20,
         "as_good_as_found": 0, "gain": difference(-0.01), "found_better_by": difference(0.05)},
        {"row": "first order", "mean_normalised": 0.77, "values": [0.77], "fitness": "margin",
         "effects": opposite, "gain": difference(0.01), "found_better_by": difference(0.03)},
    ]  # fmt: skip
    write("controls.json", head | {"level": 0.95, "rows": rows, "sentences": [said]})
    row = {
        "space": "full", "isotropize": False, "hyperparameters": {}, "scale": 0.5, "search": 0.7,
        "seconds": 3.0, "merged": scores["merged"], "mean_normalised": {"merged": 0.76, "enmp": 0.8},
        "pruned": mask["pruned"],
    }  # fmt: skip
    rows, refused = [row | {"method": m} for m in ("ties", "sum")], {"lego, full": "not these ranks"}
    write("compare.json", head | {"fitness": "accuracy", "rows": rows, "left_out": refused})
    (run / "merged").mkdir(exist_ok=True)
    exported = {"rank": 16, "error": 0.03, "mean_normalised": 0.79}
    recipe = {"format": "peft", "options": {"rank": 16}, "exported": exported}
    (run / "merged" / "enmp_config.yaml").write_text(yaml.safe_dump(recipe))
    return run


def make_weighted_run(path, seeds=1):
    """A run directory of a gradient search, which finds weights."""
    run = make_run(path)
    lines = [
        {"seed": seed, "step": step, "fitness": [None if step == 3 else 0.7 + 0.01 * step], "best": best,
         "mean": None, "example_evaluations": 3600.0 * step, "selection": None if step % 2 else 0.8}
        for seed in range(seeds)
        for step, best in enumerate([None, *np.linspace(0.7, 0.8, 9 - seed)])
    ]  # fmt: skip
    (run / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    mask = json.loads((run / "mask.json").read_text())
    mask["weights"] = [*([*module, 0.0] for module in mask["pruned"]), [2, "cars", 2.75], [7, "dtd", 0.5]]
    mask["merge"] = {"method": "tsv", "space": "full"}
    (run / "mask.json").write_text(json.dumps(mask))
    scores = json.loads((run / "scores.json").read_text())
    for key in ("masks_evaluated", "distinct_masks", "masks_per_second", "gain"):
        del scores[key]
    scores |= {"weighted": 6, "example_evaluations": 32400.0, "fitness": "margin", "rungs": [{"a": 1}],
               "seeds": [{"seed": seed, "mean_normalised": 0.9, "gain": None, "weighted": 6}
                         for seed in range(seeds)], "scale_grid": {"0.4": None, "0.5": 0.71}}  # fmt: skip
    (run / "scores.json").write_text(json.dumps(scores))
    return run
