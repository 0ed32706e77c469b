"""The files of a report: pictures and one self-contained page."""

from __future__ import annotations

from pathlib import Path

from enmp_jax.io.files import write_bytes
from enmp_jax.report.data import read
from enmp_jax.report.page import page
from enmp_jax.report.plots import plots_of, render


def write_plots(run_dir: Path) -> list[Path]:
    """Draw ``plots/*.png`` of a finished run directory.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    data, folder = read(run_dir), Path(run_dir) / "plots"
    images = {folder / f"{name}.png": render(plot.draw, data) for name, plot in plots_of(data).items()}
    folder.mkdir(exist_ok=True)
    for path, image in images.items():
        write_bytes(path, image)
    return list(images)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a finished run directory: one file, nothing loaded from elsewhere.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    path = Path(run_dir) / "report.html"
    write_bytes(path, page(read(run_dir)).encode())
    return path
