"""`mrecg-onnx compare` and `study`: many runs on one model and equal data."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from ..config import Config
from ..config_file import parse_precision, split
from ..data_config import DataConfig
from ..errors import UsageError, near_misses
from ..option import flag
from ..processes import Processes
from .endings import interruptible, reported
from .files import calibration_at, samples_at, writer
from .options import EXIT_CODES, PATH, SectionedCommand, config_options, given
from .shown import Shown

if TYPE_CHECKING:
    from ..comparison import Distilled
    from ..samples import Samples
    from ..source import SourceModel


# What the runs of an experiment differ in cannot be given for all of them.
_VARIED_BY_COMPARE = ("algorithm", "units", "seed", "weight_bits", "activation_bits", "metric", "max_drop")
_VARIED_BY_STUDY = ("units", "merge", "metric", "max_drop")
_RESULTS = click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    metavar="RESULTS.json",
    help="Results; a page of the same name is drawn beside (again with `report`).",
)


@click.command("compare", cls=SectionedCommand, epilog=EXIT_CODES, short_help="Several methods on one model and equal data, in one table.")
@click.argument("model", type=PATH)
@_RESULTS
@click.option(
    "--methods", default="mse,adaround,brecq,qdrop,mrecg+brecq,mrecg+qdrop", show_default=True, help="What to compare, separated by commas."
)
@click.option("-p", "--precisions", default="w4a4", show_default=True, help="Bit widths, separated by commas.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, separated by commas; their spread is shown.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts instead of the table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@config_options(Config, DataConfig, hidden=_VARIED_BY_COMPARE)
def compare(
    model: Path, output: Path, methods: str, precisions: str, seeds: str, as_json: bool, verbose: bool, quiet: bool, **options: Any
) -> None:
    """Run several methods on MODEL with the same data, batch and iterations, and measure each exported file under ONNX Runtime.

    \b
    A method is an algorithm (every block alone), or mrecg+ALGORITHM (units by loss), or mrecg:UNITS+ALGORITHM. Algorithms:
    minmax, mse, aciq, lapq (ranges only); adaround, adaquant, bit-split (layer by layer); brecq, qdrop (block by block).
    zeroq+METHOD calibrates on samples distilled from the model's BatchNorm instead of yours (--synthetic-samples of them).
    Rows that RESULTS.json has already for the same model, data and settings are not run again.

    \b
    mrecg-onnx compare net.onnx --calibration-data calib.npz --eval-data eval.npz \\
        --methods mse,brecq,mrecg+brecq --precisions w4a4,w2a4 --preset fast -o compare.json
    """
    with reported(verbose), interruptible(lambda: _left(output)):
        from .. import comparison, report, terminal
        from ..baselines.zeroq import statistics_of
        from ..experiments_page import experiments_page

        shown = Shown(as_json, verbose, quiet)
        source, calibration, distilled, evaluation, base = _experiment(model, output, options, _VARIED_BY_COMPARE, shown.log)
        todo = comparison.jobs(_listed(methods), _listed(precisions), _integers("--seeds", seeds), base)
        if any(job.is_data_free for job in todo):
            statistics_of(source)  # now, not hours later
        with terminal.progress_on(shown.log) as progress:
            facts = comparison.run_jobs(source, calibration, distilled, evaluation, todo, writer(source), output, progress)
        lines = comparison.summary(facts["rows"])
        said = comparison.concluded(output, comparison=comparison.common_facts(facts["rows"]) | {"lines": lines})
        page = output.with_suffix(".html")
        report.write_text(page, experiments_page(said))
        if as_json:
            click.echo(report.as_json(facts | {"summary": lines}), nl=False)
        shown.out.print(terminal.comparison_table(lines, shown.out.width))
        shown.out.print(f"wrote {output} and {page}", markup=False, soft_wrap=True)


@click.command("study", cls=SectionedCommand, epilog=EXIT_CODES, short_help="Test the claims behind MRECG on your own model.")
@click.argument("model", type=PATH)
@_RESULTS
@click.option(
    "--claims", default="oscillation,final-error,accuracy,data,theorem", show_default=True, help="What to study, separated by commas."
)
@click.option("-p", "--precision", metavar="W4A4", help="Shorthand for --weight-bits and --activation-bits.")
@click.option("--schemes", type=int, default=20, show_default=True, help="Random unit schemes behind `final-error` and `accuracy`.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts instead of the verdicts.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@config_options(Config, DataConfig, hidden=_VARIED_BY_STUDY)
def study(
    model: Path, output: Path, claims: str, precision: str | None, schemes: int, as_json: bool, verbose: bool, quiet: bool, **options: Any
) -> None:
    """Test the claims behind MRECG on MODEL: each gives a figure, its numbers, and a sentence of verdict, also where it does not hold.

    \b
    oscillation  the loss along the network with AdaRound, BRECQ and MRECG
    final-error  the final error against the largest earlier one, over random unit schemes
    accuracy     the accuracy against the final error, over the same schemes
    data         the accuracy against batch size and sample count
    theorem      how often the loss rises between equivalent neighbours

    Runs that RESULTS.json has already are not made again.
    """
    with reported(verbose), interruptible(lambda: _left(output)):
        from .. import comparison, report, terminal
        from ..capacity import mergeable
        from ..experiments_page import experiments_page
        from ..study import CLAIMS, findings, study_jobs
        from ..survey import survey

        names = _listed(claims)
        unknown = next((name for name in names if name not in CLAIMS), None)
        if unknown is not None:
            raise UsageError(f"--claims {unknown}: must be among {', '.join(CLAIMS)}{near_misses(unknown, CLAIMS)}")
        if schemes < 4:
            raise UsageError(f"--schemes {schemes}: a correlation needs at least 4")
        shown = Shown(as_json, verbose, quiet)
        options |= parse_precision(precision) if precision else {}
        source, calibration, distilled, evaluation, base = _experiment(model, output, options, _VARIED_BY_STUDY, shown.log)
        rows = survey(source, calibration, dataclasses.replace(base, units="none")).rows
        boundaries = sorted(mergeable([row.traits for row in rows], cross_stage=True))
        count = min(calibration.count, base.calibration_samples)
        todo = study_jobs(names, base, boundaries, [row.block.name for row in rows], schemes, count)
        with terminal.progress_on(shown.log) as progress:
            facts = comparison.run_jobs(source, calibration, distilled, evaluation, todo, writer(source), output, progress)
        facts |= {"findings": report.finite(findings(names, facts["rows"]))}
        studied = {"precision": base.label, "algorithm": base.algorithm, "findings": facts["findings"]}
        said = comparison.concluded(output, study=comparison.common_facts(facts["rows"]) | studied)
        page = output.with_suffix(".html")
        report.write_text(page, experiments_page(said))
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        shown.out.print(terminal.study_findings(facts["findings"]))
        shown.out.print(f"wrote {output} and {page}", markup=False, soft_wrap=True)


def _experiment(
    model: Path, output: Path, options: dict[str, Any], varied: tuple[str, ...], log: Console
) -> "tuple[SourceModel, Samples, Distilled, Samples, Config]":
    """Model, data (given, made, and to measure on) and common settings of several runs; what the runs vary cannot be given."""
    from ..baselines.zeroq import synthetic_samples
    from ..comparison import Distilled
    from ..cpu import keep_freed_memory
    from ..source import load_source

    if Processes.of(os.environ).count > 1:
        raise UsageError("torchrun: every process would make all the runs; start one alone (`quantize` is what shares its work)")
    found = given(options)
    taken = next((name for name in varied if name in found), None)
    if taken is not None:
        raise UsageError(f"{flag(taken)}: is not one setting for all runs of an experiment; see --help")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: the folder {output.parent} does not exist")
    config, data = split(found)
    if data.calibration_data is None or data.eval_data is None:
        raise UsageError("--calibration-data and --eval-data are both needed: methods are compared on samples that none of them has seen")
    keep_freed_memory()
    source = load_source(model)
    calibration = calibration_at(data.calibration_data, source, config, data, None, log)
    size = "x".join(map(str, data.size)) if data.size else "as the model has it"
    distilled = Distilled(
        f"{data.synthetic_samples} samples, size {size}",
        lambda seed, progress: synthetic_samples(source, data.synthetic_samples, seed, data.size, config.device, progress),
    )
    return source, calibration, distilled, samples_at(data.eval_data, source, data, "--eval-data", data.eval_samples), config


def _left(output: Path) -> str:
    """What an experiment that broke off goes on from, in words."""
    return f"; {output} has the runs that ended, and the same command goes on from there" if output.exists() else ""


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected integers separated by commas") from None
