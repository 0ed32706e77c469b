"""``enmp compare``: every merge method in every space at its best, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli.output import Output, print_result, reporting
from enmp_jax.cli.run_option import RunOrDirectory, Settings, load_run_or_directory


@dataclass(frozen=True)
class Args(Output):
    """Which merge is best for these adapters: every method in every space with its best scale and density.

    Both are chosen on the search split; the test split is scored once a row. With --out the rows are kept,
    and the same command goes on where it stopped. Of a finished search's DIR, the table goes there.
    """

    run: RunOrDirectory
    out: Path | None = None
    """Directory for compare.json and plots/compare.png; default: DIR, or none."""
    methods: tuple[str, ...] = ()
    """Only these: ties, tsv, ...; default: all."""
    spaces: tuple[str, ...] = ()
    """Only these: full, knots, core; default: all."""
    search: bool = False
    """Also run the run file's search under every method, for a column of pruned or weighted merges."""
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp compare``."""
    from enmp_jax.devices import distributed

    distributed.initialize(distributed.find_job())
    import jax

    from enmp_jax.report.terminal import print_comparison
    from enmp_jax.runs.compare import compare_run

    config, directory = load_run_or_directory(args.run, args.set, args.skip_bad)
    out = args.out or directory
    with reporting(args) as reporter:
        result = compare_run(config, out, reporter, args.methods, args.spaces, args.search)
    if jax.process_index():
        return
    if out is not None:
        from enmp_jax.report.figures import comparison
        from enmp_jax.report.write import write_table

        write_table(out, "compare", comparison(result))
    print_result(args, result, print_comparison)
