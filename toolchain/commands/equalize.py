"""`mrecg-onnx equalize`: an equal float model that loses less when it is quantized."""

from pathlib import Path
from typing import Any

import click

from ..config import Config
from ..config_file import parse_precision, split
from ..data_config import DataConfig
from ..errors import UsageError
from .endings import reported
from .files import calibration_at, check_loads, check_output
from .options import EXIT_CODES, PATH, Option, SectionedCommand, config_options, given
from .shown import Shown


@click.command(cls=SectionedCommand, epilog=EXIT_CODES, short_help="An equal float model of a transformer that loses less.")
@click.argument("model", type=PATH)
@click.option("-p", "--precision", metavar="W4A4", help="The precision that it is to be quantized to, as of `quantize`.")
@click.option(
    "--calibration-data",
    cls=Option,
    is_file=True,
    metavar="DATA",
    help="Calibration samples: .npz, .npy, an image folder, or module:function.",
)
@click.option("-o", "--output", type=PATH, help="The file to write. Default: NAME.equalized.onnx beside MODEL.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@config_options(Config, only="precision")
@config_options(DataConfig, only="images")
def equalize(
    model: Path,
    precision: str | None,
    calibration_data: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Move the spread of channels from what normalizations of MODEL make into the weights that read it (SmoothQuant).

    What is written computes the same in float, and is quantized in place of MODEL.

    \b
    mrecg-onnx equalize encoder.onnx -p w8a8 --calibration-data texts.npz
    mrecg-onnx quantize encoder.equalized.onnx -p w8a8 --calibration-data texts.npz
    """
    with reported(verbose):
        config, data = split((parse_precision(precision) if precision else {}) | given(options))
        output = output or model.with_name(f"{model.stem}.equalized.onnx")
        check_output(model, output, overwrite)
        if calibration_data is None:
            raise UsageError("--calibration-data is missing: samples of the model's real input are needed")
        from exporters import write_model

        from .. import equalization, report, terminal
        from ..source import load_source

        shown = Shown(as_json, verbose)
        source = load_source(model)
        samples = calibration_at(calibration_data, source, config, data, config.calibration_samples, shown.log)
        with terminal.progress_on(shown.log) as progress:
            found = equalization.equalize(source, samples, config, progress)
        check_loads(found.model)
        write_model(found.model, output)
        facts = report.finite(
            {
                "float": str(model),
                "output": str(output),
                "precision": config.label,
                "agreement": found.agreement,
                "notes": list(found.notes),
                "values": [
                    {
                        "value": choice.group.value,
                        "readers": list(choice.group.readers),
                        "strength": choice.strength,
                        "errors": {f"{strength:g}": error for strength, error in choice.errors.items()},
                        "folded": list(choice.group.folded),
                    }
                    for choice in found.choices
                ],
            }
        )
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        else:
            shown.out.print(terminal.equalization_table(facts))
