"""`mrecg-onnx diagnose`: where the error of a quantized file enters."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..data_config import DataConfig
from ..errors import UsageError
from .endings import reported
from .files import samples_at
from .options import EXIT_CODES, PATH, Option, SectionedCommand, config_options, given
from .shown import Shown

_MOST_LAYERS = 15  # in the table


@click.command("diagnose", cls=SectionedCommand, epilog=EXIT_CODES, short_help="Where a quantized file's error enters; what to try next.")
@click.argument("float_model", metavar="FP32", type=PATH)
@click.argument("quantized_model", metavar="QDQ", type=PATH)
@click.option(
    "--data", "place", cls=Option, is_file=True, metavar="DATA", help="Samples to run: .npz, .npy, an image folder, or module:function."
)
@click.option("--samples", type=int, default=16, show_default=True, help="Most samples to use.")
@click.option(
    "--try", "tried", type=int, default=8, show_default=True, help="Layers to run float one at a time, worst first; 0: try nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show all layers, and tracebacks.")
@config_options(DataConfig, only="images")
def diagnose_command(
    float_model: Path, quantized_model: Path, place: str | None, samples: int, tried: int, as_json: bool, verbose: bool, **options: Any
) -> None:
    """Find where the error of QDQ, a file that `quantize` wrote from FP32, enters, and what to try against it.

    \b
    Added: the noise of a layer whose quantizers read the float model's values. Total: what it comes to in the file as it runs.
    A layer with much added noise makes it; one with much total but little added noise only passes it on.

    \b
    mrecg-onnx diagnose net.onnx net.w4a4.onnx --data calib.npz
    """
    with reported(verbose):
        if place is None:
            raise UsageError("--data is missing: samples of the model's real input")
        if samples < 1 or tried < 0:
            raise UsageError("--samples must be at least 1 and --try at least 0")
        if not quantized_model.is_file():
            raise UsageError(f"{quantized_model}: no such file")
        import onnx

        from .. import report, terminal
        from ..diagnosis import diagnose
        from ..source import load_source
        from ..suggestions import suggestions
        from ..wider import SAMPLES, gains_of_wider

        data = DataConfig(**given(options))
        source = load_source(float_model)
        found = samples_at(place, source, data, "--data", max(samples, 2 * SAMPLES))
        shown = Shown(as_json, verbose)
        with terminal.progress_on(shown.log) as progress:
            result = diagnose(source, onnx.load(quantized_model), found.first(samples), tried, progress)
            wider = gains_of_wider(source, result.settings, found, progress) if tried else {}
        facts = report.finite(
            {
                "float": str(float_model),
                "quantized": str(quantized_model),
                **dataclasses.asdict(result),
                "wider": wider,
                "suggestions": suggestions(result, wider),
            }
        )
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        else:
            shown.out.print(terminal.diagnosis_table(facts, None if verbose else _MOST_LAYERS, shown.out.width))
