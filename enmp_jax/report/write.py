"""The files of a report: pictures and one self-contained page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.writing import write_file
from enmp_jax.report.data import read
from enmp_jax.report.limits import drawn
from enmp_jax.report.page import page
from enmp_jax.report.plots import plots_of, render


def write_plots(run_dir: Path) -> list[Path]:
    """Draw ``plots/*.png`` of a finished run directory.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    data, folder = read(run_dir), Path(run_dir) / "plots"
    shown, _ = drawn(data)
    with _whole(run_dir):
        images = {folder / f"{name}.png": render(plot.draw, shown) for name, plot in plots_of(data).items()}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}") from None
    for path, image in images.items():
        write_file(path, lambda temporary, image=image: temporary.write_bytes(image))
    return list(images)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a finished run directory: one file, nothing loaded from elsewhere.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    path = Path(run_dir) / "report.html"
    data = read(run_dir)
    with _whole(run_dir):
        content = page(data).encode("utf-8", "replace")
    write_file(path, lambda temporary: temporary.write_bytes(content))
    return path


@contextlib.contextmanager
def _whole(run_dir: Path) -> Iterator[None]:
    """Files that pass the checks and cannot be drawn all the same are damaged in a way nobody thought of."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the files of {run_dir} do not fit together ({what}): they are damaged") from error
