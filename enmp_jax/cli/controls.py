"""``enmp controls``: is what a search found more than luck, and more than simpler ways give?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli.output import Output, print_result, reporting
from enmp_jax.cli.run_option import RunOrDirectory, Settings, load_run_or_directory
from enmp_jax.errors import UserError


@dataclass(frozen=True)
class Args(Output):
    """Compare what a search found with random, leave-one-out, greedy and first-order pruning, with pruning by
    norm and by cosine, with the same mask under other methods, with adapters that learnt nothing, and with
    one LoRA for all tasks trained on the same data; with intervals and corrected p-values.

    Takes the DIR of a finished search, or a run file whose search it runs first. Every row scores the test
    split once. The same command goes on where it stopped.
    """

    run: RunOrDirectory
    out: Path | None = None
    """Of a run file: the run directory to make or to go on with."""
    rows: tuple[str, ...] = ()
    """Kinds: random, shuffled, leave_one_out, first_order, greedy, norm, cosine, transfer, random_adapters,
    joint_lora, sensitivity; default: all but sensitivity, which runs many searches."""
    masks: int = 20
    """Random masks, and shuffled weights."""
    seeds: int = 3
    """Seeds of random adapters, joint LoRAs and sensitivity."""
    generations: int | None = None
    """Of the searches of sensitivity; default: the run's."""
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp controls``."""
    from enmp_jax.devices import distributed

    distributed.initialize(distributed.find_job())
    import jax

    from enmp_jax.report.terminal import print_controls
    from enmp_jax.runs.controls import DEFAULT, controls_run

    config, directory = load_run_or_directory(args.run, args.set, args.skip_bad)
    if directory is not None and args.out is not None:
        raise UserError(f"the controls of the search in {directory} go there: leave out --out")
    out = directory or args.out
    if out is None:
        raise UserError("give --out DIR for the search of this run file, or the DIR of a finished search")
    with reporting(args) as reporter:
        result = controls_run(
            config, out, reporter, args.rows or DEFAULT, args.masks, args.seeds, args.generations
        )
    if jax.process_index():
        return
    from enmp_jax.report.figures import controls
    from enmp_jax.report.write import write_table

    write_table(out, "controls", controls(result))
    print_result(args, result, print_controls)
