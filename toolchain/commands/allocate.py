"""`mrecg-onnx allocate`: which layers need more bits for the accuracy to hold."""

import shlex
from pathlib import Path
from typing import Any

import click

from ..config import Config
from ..config_file import dump_config, parse_precision, split
from ..data_config import DataConfig
from ..errors import AccuracyGateError, UsageError
from .endings import reported
from .files import calibration_at, check_output, samples_at, save_text, writer
from .options import EXIT_CODES, PATH, Option, SectionedCommand, config_options, given
from .shown import Shown


@click.command(cls=SectionedCommand, epilog=EXIT_CODES, short_help="Mixed precision: the layers that need more bits, or float.")
@click.argument("model", type=PATH)
@click.option("-p", "--precision", metavar="W4A4", help="Bits of the other layers, as of `quantize`.")
@click.option(
    "--to",
    "wider",
    cls=Option,
    metavar="W8A8|float",
    help="What the layers get. Default: w8a8 where the others have fewer bits, else float.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Signal to noise that the worst output must have; goes without labels.")
@click.option("-o", "--output", type=PATH, help="The settings to write. Default: NAME.allocated.toml beside MODEL.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@config_options(Config, DataConfig)
def allocate(
    model: Path,
    precision: str | None,
    wider: str | None,
    min_sqnr: float | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Choose the fewest layers of MODEL that need more bits, or float, for --max-drop or --min-sqnr to hold: mixed precision.

    Layers are ordered by the noise that each makes alone, and files with more and fewer of them tried under ONNX Runtime, all rounded to
    nearest, which takes seconds each. What is written are settings for `quantize`, which learns the rounding with these bits.

    \b
    mrecg-onnx allocate net.onnx -p w4a4 --calibration-data calib.npz --eval-data eval.npz --max-drop 1.0
    mrecg-onnx quantize net.onnx --config net.allocated.toml
    """
    with reported(verbose):
        config, data = split((parse_precision(precision) if precision else {}) | given(options))
        output = output or model.with_name(f"{model.stem}.allocated.toml")
        check_output(model, output, overwrite)
        if data.calibration_data is None or data.eval_data is None:
            raise UsageError("--calibration-data and --eval-data are both needed: layers are chosen by what other samples than those show")
        if output.resolve() in (Path(place).resolve() for place in (data.calibration_data, data.eval_data)):
            raise UsageError(f"--output {output}: has the samples; choose another name")
        from .. import report, terminal
        from ..allocation import FLOAT, Goal, widened
        from ..allocation import allocate as allocated
        from ..cpu import keep_freed_memory
        from ..metric import Metric
        from ..source import load_source

        goal = Goal(data.max_drop, min_sqnr)
        wider = (wider or ("w8a8" if min(config.weight_bits, config.activation_bits) < 8 else FLOAT)).lower()
        metric = Metric.at(data.metric) if data.metric is not None else None
        shown = Shown(as_json, verbose)
        keep_freed_memory()
        source = load_source(model)
        calibration = calibration_at(data.calibration_data, source, config, data, config.calibration_samples, shown.log)
        evaluation = samples_at(data.eval_data, source, data, "--eval-data", data.eval_samples)
        with terminal.progress_on(shown.log) as progress:
            found = allocated(source, calibration, evaluation, config, wider, goal, writer(source), metric, progress)
        facts = report.finite(
            {
                "model": str(model),
                "output": str(output) if found.holds else None,
                "precision": config.label,
                "to": wider,
                "metric": metric.name if metric is not None else None,
                "max_drop": goal.max_drop,
                "min_sqnr": goal.min_sqnr,
                "samples": evaluation.count,
                "holds": found.holds,
                "layers": list(found.layers) if found.holds else [],
                "room": list(found.room),
                "trials": [{"layers": trial.layers, "drop": trial.drop, "sqnr": trial.sqnr} for trial in found.trials],
            }
        )
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        shown.out.print(terminal.allocation_table(facts))
        if not found.holds:
            counts = f"{len(found.layers)} of {len(found.room)} layers"
            advice = "see what diagnose says of a file" if wider == FLOAT else f"try --to {FLOAT}"
            raise AccuracyGateError(f"with {counts} at {wider} it does not hold; nothing was written: {advice}")
        save_text(output, dump_config(widened(config, source.graph, found.nodes, wider), data), "--output")
        if found.layers:
            shown.out.print(f"at {wider}: {', '.join(found.layers)}", markup=False, soft_wrap=True)
        command = shlex.join(["mrecg-onnx", "quantize", str(model), "--config", str(output)])
        shown.out.print(f"wrote {output}: {command}", markup=False, soft_wrap=True)
