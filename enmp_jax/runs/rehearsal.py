"""The end of a search before its beginning: what is written at the end is written once, of empty results."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import yaml

from enmp_jax.adapters.model_card import model_card
from enmp_jax.adapters.recipe import Recipe, config_yaml
from enmp_jax.config.schema import to_dict
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator


def rehearse(evaluator: Evaluator) -> None:
    """Make cards, files and pictures of a search that found nothing, and throw them away.

    Raises:
        UserError: one of them cannot be made.
    """
    from enmp_jax.report.data import read
    from enmp_jax.report.figures import figures
    from enmp_jax.report.limits import drawn
    from enmp_jax.report.page import page
    from enmp_jax.report.paper import draw  # matplotlib is slow to import

    loaded = evaluator.loaded
    spec, tasks, merge = loaded.mask_spec, loaded.tasks, loaded.run.merge.recipe()
    column = dict.fromkeys(tasks, 0.5)
    scores = {
        "split": "test", "tasks": list(tasks), "reference": column, "base": column, "merged": column,
        "enmp": column, "mean_normalised": {"merged": 0.5, "enmp": 0.5}, "fitness": loaded.run.search.fitness,
        "modules": spec.n_modules, "pruned": [], "seeds": [], "scale_grid": {"1": 0.5},
    }  # fmt: skip
    recipe = Recipe({**merge, "scale": 1.0}, [], 0, scores)
    line = {"seed": 0, "generation": 0, "masks_evaluated": 1, "best": 0.5, "fitness": [0.5]}
    contents = {
        "config.yaml": yaml.safe_dump(to_dict(loaded.run), allow_unicode=True),
        "environment.json": "{}",
        "history.jsonl": json.dumps(line) + "\n",
        "mask.json": json.dumps(spec.to_json(spec.all_kept(), 1.0, merge), allow_nan=False),
        "scores.json": json.dumps(scores, allow_nan=False),
    }
    try:
        with tempfile.TemporaryDirectory() as name:
            for file, text in contents.items():
                (Path(name) / file).write_bytes(text.encode())
            for kind in ("adapters", "peft"):
                base = loaded.adapters.base_model
                model_card(kind, loaded.adapters, recipe, base).encode()
                config_yaml(kind, loaded.adapters, recipe, base).encode()
            data = read(Path(name))
            page(data).encode("utf-8", "replace")
            for chart in figures(drawn(data)[0]).values():
                draw(chart).draw_without_rendering()
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"the results of this run could not be written: {error}") from error
