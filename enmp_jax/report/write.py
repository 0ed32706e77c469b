"""The files of a report: pictures and one self-contained page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.writing import write_file
from enmp_jax.report.charts import Chart
from enmp_jax.report.damage import DAMAGE
from enmp_jax.report.data import RunData, read
from enmp_jax.report.figures import comparison, controls, figures
from enmp_jax.report.limits import drawn
from enmp_jax.report.page import page
from enmp_jax.report.paper import files
from enmp_jax.report.side_by_side import side_by_side


def write_all(run_dir: Path) -> Path:
    """``write_plots`` and ``write_report`` of a run that is read once; returns the page."""
    data = read(run_dir)
    write_plots(run_dir, data)
    return write_report(run_dir, data)


def write_plots(run_dir: Path, data: RunData | None = None) -> list[Path]:
    """Draw ``plots/*.png`` and ``*.svg`` of a finished run directory.

    Args:
        run_dir: of the run.
        data: what it says, where it was read already.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    data = data or read(run_dir)
    shown, _ = drawn(data)
    with _whole(run_dir):
        charts = figures(shown)
        for name, make in (("compare", comparison), ("controls", controls)):
            if (result := getattr(data.beside, name)) is not None:
                charts[name] = make(result)
        images = {name: files(chart) for name, chart in charts.items()}
    return _write(Path(run_dir) / "plots", images)


def write_table(folder: Path, name: str, chart: Chart) -> None:
    """Draw the chart of ``enmp compare`` or ``controls`` into ``plots``; a run's page takes it in.

    Raises:
        UserError: a file of the run is damaged, or the disk is full.
    """
    _write(folder / "plots", {name: files(chart)})
    if (folder / "report.html").exists():
        write_report(folder)


def _write(folder: Path, images: dict[str, dict[str, bytes]]) -> list[Path]:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}") from None
    written = []
    for name, kinds in images.items():
        for kind, image in kinds.items():
            path = folder / f"{name}.{kind}"
            write_file(path, lambda temporary, image=image: temporary.write_bytes(image))
            written.append(path)
    return written


def write_report(run_dir: Path, data: RunData | None = None) -> Path:
    """Write ``report.html`` of a finished run directory: one file, nothing loaded from elsewhere.

    Args:
        run_dir: of the run.
        data: what it says, where it was read already.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    path = Path(run_dir) / "report.html"
    data = data or read(run_dir)
    with _whole(run_dir):
        content = page(data).encode("utf-8", "replace")
    write_file(path, lambda temporary: temporary.write_bytes(content))
    return path


def write_comparison(
    run_dirs: Sequence[Path], differences: Sequence[Mapping[str, Any] | None], out: Path
) -> Path:
    """Write several finished runs on one page.

    Args:
        run_dirs: their directories.
        differences: of each to the first; None where their test examples differ.
        out: the page.

    Raises:
        UserError: a file of a run is missing or damaged.
    """
    last = [Path(path).resolve().name for path in run_dirs]
    names = last if len(set(last)) == len(last) else [str(path) for path in run_dirs]
    if len(set(names)) < len(names):
        raise UserError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    runs = {name: read(path) for name, path in zip(names, run_dirs, strict=True)}
    known = {name: found for name, found in zip(names, differences, strict=True) if found is not None}
    with _whole(run_dirs[0].parent):
        content = side_by_side(runs, known).encode("utf-8", "replace")
    write_file(out, lambda temporary: temporary.write_bytes(content))
    return out


@contextlib.contextmanager
def _whole(run_dir: Path) -> Iterator[None]:
    """Files that pass the checks and cannot be drawn all the same are damaged in a way nobody thought of."""
    try:
        yield
    except DAMAGE as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the files of {run_dir} do not fit together ({what}): they are damaged") from error
