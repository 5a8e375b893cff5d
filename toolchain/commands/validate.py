"""`mrecg-onnx validate`: a quantized file against the float model that it was made from."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..data_config import DataConfig
from ..errors import UsageError
from ..option import flag
from .endings import check_drop, reported
from .files import samples_at
from .options import EXIT_CODES, PATH, SectionedCommand, config_options, given

_UNUSED = ("calibration_data", "synthetic_samples")


@click.command("validate", cls=SectionedCommand, epilog=EXIT_CODES, short_help="A quantized file beside its float model.")
@click.argument("float_model", metavar="FP32", type=PATH)
@click.argument("quantized_model", metavar="QDQ", type=PATH)
@click.option("--device", metavar="auto|cuda|cpu", default="auto", show_default=True, help="Execution provider.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@config_options(DataConfig, hidden=_UNUSED)
def validate_command(float_model: Path, quantized_model: Path, device: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Compare QDQ, a quantized model of any tool, with FP32, the float model it was made from, under ONNX Runtime.

    \b
    mrecg-onnx validate net.onnx net.w4a8.onnx --eval-data val/ --max-drop 1.0
    """
    with reported(verbose):
        if device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {device}: must be one of auto, cuda, cpu")
        found = given(options)
        unused = next((name for name in _UNUSED if name in found), None)
        if unused is not None:
            raise UsageError(f"{flag(unused)}: nothing is calibrated here; --eval-data has the samples to compare the models on")
        data = DataConfig(**found)
        if data.eval_data is None:
            raise UsageError("--eval-data is missing: samples to compare the models on")
        if not quantized_model.is_file():
            raise UsageError(f"{quantized_model}: no such file")
        from .. import large, report, terminal
        from ..metric import Metric
        from ..source import load_source
        from ..validation import validate

        metric = Metric.at(data.metric) if data.metric is not None else None
        source = load_source(float_model)
        samples = samples_at(data.eval_data, source, data, "--eval-data", data.eval_samples)
        elsewhere = _is_for_elsewhere(quantized_model)
        checked = validate(float_model, quantized_model, samples, large.file_bytes(float_model), device, elsewhere=elsewhere, metric=metric)
        facts = report.validation_report(checked)
        if as_json:
            click.echo(report.as_json(facts), nl=False)
        else:
            Console(highlight=False).print(terminal.validation_table(report.finite(facts) | {"evaluated_on": data.eval_data}))
        check_drop(checked, data.max_drop)


def _is_for_elsewhere(quantized_model: Path) -> bool:
    """Whether a file says that it was made for another runtime than ONNX Runtime."""
    import onnx
    from google.protobuf.message import DecodeError

    from ..protos import metadata
    from ..scheme import TARGETS

    try:
        target = metadata(onnx.load(quantized_model, load_external_data=False)).get("mrecg_onnx.target", "")
    except DecodeError:  # ONNX Runtime says it better
        return False
    return target in TARGETS and TARGETS[target].elsewhere
