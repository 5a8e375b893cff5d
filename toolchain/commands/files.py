"""What the arguments name: samples to read, files to write; refused before any work where they will not do."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from ..config import Config
from ..data_config import SYNTHETIC, DataConfig
from ..errors import ExportError, MrecgError, UsageError

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

    from ..quant_table import QuantTable
    from ..samples import Samples
    from ..source import SourceModel


def samples_at(place: str, source: "SourceModel", data: DataConfig, option: str, limit: int | None) -> "Samples":
    """The samples that an option names, checked against the inputs and classes of the model; `limit` is the most that are used.

    Calibration samples need no labels where there are samples to evaluate on: their classes may be those of other data.
    """
    from ..samples import Preprocessing, Samples, load_samples
    from ..survey import check_classes

    labels = Path(data.labels) if data.labels is not None and option == "--eval-data" else None
    samples = load_samples(place, source.inputs, Preprocessing.of(data), option, labels, limit, data.metric is not None)
    if option == "--calibration-data" and data.eval_data is not None:
        samples = Samples(samples.inputs, note=samples.note)
    if data.metric is None:
        check_classes(source, samples, f"{option} {place}")
    return samples if limit is None or option == "--calibration-data" else samples.first(limit)


def calibration_at(place: str, source: "SourceModel", config: Config, data: DataConfig, limit: int | None, log: "Console") -> "Samples":
    """The calibration samples that were asked for: read, or made where there are none."""
    if place != SYNTHETIC:
        return samples_at(place, source, data, "--calibration-data", limit)
    from .. import terminal
    from ..baselines.zeroq import synthetic_samples

    with terminal.progress_on(log) as progress:
        samples = synthetic_samples(source, data.synthetic_samples, config.seed, data.size, config.device, progress)
    log.print(f"[yellow]--calibration-data synthetic: {escape(samples.note or '')}[/yellow]")
    return samples


def check_output(model: Path | None, output: Path, overwrite: bool, option: str = "--output") -> None:
    """Refuse, before any work, what could not be written after it."""
    if model is not None and output.exists() and output.resolve() == model.resolve():
        raise UsageError(f"{option} {output}: is the source model; choose another name")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists; give --overwrite or another {option}")
    if not output.parent.is_dir():
        raise UsageError(f"{option} {output}: the folder {output.parent} does not exist")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"{option} {output}: the folder {output.parent} is not writable")


def save_text(path: Path, text: str, option: str = "--save-config") -> None:
    """Write the settings that an option names a place for."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}") from error


def check_loads(exported: "onnx.ModelProto") -> None:
    """Refuse a file that ONNX Runtime does not load, before it is written."""
    from .. import runtime

    try:
        runtime.session(exported)
    except MrecgError as error:
        raise ExportError(f"the exported model does not load: {error}") from error


def writer(source: "SourceModel") -> "Callable[[QuantTable, Config, Path], None]":
    """What writes the quantized model of a table to a path."""
    from exporters import export_qdq, write_model

    return lambda table, config, path: write_model(export_qdq(source.model, table, scheme=config.scheme), path)
