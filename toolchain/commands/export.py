"""`mrecg-onnx export`: a finished table for another target, without learning again."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..config_file import dump_config, settings_in, split
from ..data_config import DataConfig
from ..errors import TargetRuleError, UsageError, near_misses
from ..option import flag
from ..scheme import TARGETS, Scheme, scheme_for
from ..wording import counted
from .endings import reported
from .files import check_loads, check_output, samples_at
from .options import EXIT_CODES, PATH, Option, SectionedCommand, config_options, given
from .shown import Shown

if TYPE_CHECKING:
    import onnx

    from ..config import Config
    from ..quant_table import QuantTable
    from ..source import SourceModel


@click.command(cls=SectionedCommand, epilog=EXIT_CODES, short_help="Write a learned table for another target.")
@click.argument("model", type=PATH)
@click.argument("table", type=PATH)
@click.option(
    "--target", cls=Option, metavar="|".join(TARGETS), help="Runtime to export for. Default: the one that the table was learned for."
)
@click.option("--storage", cls=Option, metavar="fast|small", help="How weights below 8 bits are stored. Default: the target's.")
@click.option(
    "--calibration-data",
    cls=Option,
    is_file=True,
    metavar="DATA",
    help="Samples to calibrate on what another target wants otherwise: .npz, .npy, an image folder, or module:function.",
)
@click.option(
    "--format",
    "format_",
    cls=Option,
    metavar="onnx|aimet",
    default="onnx",
    show_default=True,
    help="QDQ file, or float file and encodings.",
)
@click.option("-o", "--output", type=PATH, required=True, help="The file to write; with --format aimet, its encodings go beside it.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@config_options(DataConfig, only="images")
def export(
    model: Path,
    table: Path,
    target: str | None,
    storage: str | None,
    calibration_data: str | None,
    format_: str,
    output: Path,
    overwrite: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Write MODEL with the grids of TABLE, for another target, without learning again.

    TABLE is what `quantize --encodings` wrote, or a file of AIMET encodings (1.0.0 or 0.6.1), whose weights are rounded to nearest. With
    --calibration-data, grids that the target wants otherwise are calibrated, and learned rounding stays.

    \b
    mrecg-onnx export net.onnx net.json --target tensorrt --calibration-data calib.npz -o net.trt.onnx
    """
    with reported(verbose):
        for name, value, known in (
            ("--target", target, tuple(TARGETS)),
            ("--storage", storage, ("fast", "small")),
            ("--format", format_, ("onnx", "aimet")),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value}: must be one of {', '.join(known)}{near_misses(value, known)}")
        images = given(options)
        if images and calibration_data is None:
            raise UsageError(f"{flag(next(iter(images)))}: is about images to calibrate on; add --calibration-data")
        check_output(model, output, overwrite)
        data = DataConfig(calibration_data=calibration_data, **images)
        _export(model, table, target, storage, data, format_, output, Shown(False, verbose))


@dataclass(frozen=True)
class _Read:
    """A table as its file has it; `learned_for` and `config` are None where the file does not say."""

    table: "QuantTable"
    learned_for: str | None
    config: "Config | None"


def _export(
    model: Path, table_file: Path, target: str | None, storage: str | None, data: DataConfig, format_: str, output: Path, shown: Shown
) -> None:
    from exporters import aimet, export_qdq, write_model
    from exporters.qdq import write_text

    from ..grids import completed
    from ..source import load_source

    source, console = load_source(model), shown.out
    found = _read(source, model, table_file, console)
    table, learned_for = found.table, found.learned_for
    scheme = scheme_for(target or learned_for or "ort-cpu", None, None, storage)
    if learned_for is not None and learned_for in TARGETS and learned_for != scheme.name:
        console.print(f"learned for {learned_for}; {scheme.name} would have learned under other rules:")
        for difference in TARGETS[learned_for].differences(scheme):
            console.print(f"  {escape(difference)}")
    metadata = {"version": __version__, "source_sha256": source.sha256, "target": scheme.name, "learned_for": learned_for or "another tool"}
    if found.config is not None:
        metadata["config"] = dump_config(found.config, DataConfig())
    if data.calibration_data is not None:
        if found.config is None:
            raise UsageError(
                f"--calibration-data: {table_file} does not say with which settings it was learned, as those that `quantize --encodings` "
                "writes do; leave it out, or quantize with --target instead"
            )
        table, config = _calibrated(source, table, found.config, scheme, data, shown)
        metadata["config"] = dump_config(config, DataConfig())
    if format_ == "aimet":
        place = output.with_suffix(".encodings")
        write_model(aimet.with_rounded_weights(source.model, table), output)
        write_text(aimet.dumps(table), place)
        console.print(f"wrote {escape(str(output))} and {escape(str(place))}")
        return
    if learned_for is None:
        table = completed(source, table, scheme)
    exported = export_qdq(source.model, table, metadata, scheme)
    check_loads(exported)
    write_model(exported, output)
    console.print(f"wrote {escape(str(output))} for {scheme.name}")
    again = f"; quantize with --target {scheme.name} instead"
    if learned_for == scheme.name or data.calibration_data is not None:
        again = ""  # those are its rules already
    elif found.config is not None:
        again = f"; give --calibration-data here, or quantize with --target {scheme.name} instead"
    _check_rules(exported, scheme.name, output, again, console)


def _read(source: "SourceModel", model: Path, table_file: Path, console: Console) -> _Read:
    from exporters import aimet

    from .. import encodings
    from ..normalise import read
    from ..source import folded_values

    try:
        text = table_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{table_file}: cannot be read: {error}") from error
    learned_for = config = None
    if '"activation_encodings"' in text:
        axes = {name: stored.axis for name, stored in source.stored.items()}
        axes |= {weight: source.channel_axis(node) for node in source.graph.weighted if (weight := source.graph.weight(node)) is not None}
        whole, data = read(model), aimet.loads(text, str(table_file))
        folded = aimet.entries_of(data, str(table_file)) & folded_values(source, whole)
        if folded:
            console.print(f"left out, since loading folds these values away: {escape(', '.join(sorted(folded)))}")
        table = aimet.from_aimet(data, source.constants, axes, str(table_file), folded)
        if moved := aimet.off_grid(table, source.constants):
            console.print(
                f"[yellow]{counted(len(moved), 'weight')} of {escape(str(model))} off the grids of {escape(str(table_file))} (such as "
                f"{escape(moved[0])}): rounded to nearest. Learned rounding is in the model that was written beside the encodings: give "
                "that one to keep it[/yellow]"
            )
        table = aimet.with_copies(whole, table)
    else:
        loaded = encodings.loads(text, str(table_file))
        table, learned_for = loaded.table, loaded.target
        if loaded.source_sha256 != source.sha256:
            raise UsageError(
                f"{table_file}: was learned on another model (SHA-256 {loaded.source_sha256[:12]}, {model} has {source.sha256[:12]})"
            )
        config = split(settings_in(loaded.config, str(table_file)))[0] if loaded.config else None
    known = {*source.constants, *source.graph.inputs, *source.graph.producer, *table.copies}
    stray = next((name for name in table if name not in known), None)
    if stray is not None:
        beside = "; encodings go with the model that was written beside them" if learned_for is None else ""
        raise UsageError(f"{table_file}: {model} has no value {stray!r}{near_misses(stray, known)}{beside}")
    return _Read(table, learned_for, config)


def _calibrated(
    source: "SourceModel", table: "QuantTable", learned_with: "Config", scheme: Scheme, data: DataConfig, shown: Shown
) -> "tuple[QuantTable, Config]":
    """The table under a target's rules, and the settings for it."""
    from .. import terminal
    from ..retarget import retargeted, settings_for

    assert data.calibration_data is not None
    config = settings_for(learned_with, scheme.name, scheme.storage)
    samples = samples_at(data.calibration_data, source, data, "--calibration-data", config.calibration_samples)
    with terminal.progress_on(shown.log) as progress:
        found = retargeted(source, table, config, samples, progress)
    shown.out.print(
        f"kept of the table: {found.kept_weights} of {counted(found.weights, 'weight')}, the steps of {found.kept_activations} of "
        f"{counted(found.activations, 'activation')}; the others were calibrated on {counted(found.samples, 'sample')}"
    )
    return found.table, config


def _check_rules(exported: "onnx.ModelProto", target: str, output: Path, again: str, console: Console) -> None:
    """Say what the runtime which a file is for computes otherwise or would not take, because its grids were learned under other rules.

    `again` says how to make a file that follows them, where there is a way.
    """
    from exporters import check

    found = check.check(exported, target) if target in check.CHECKED else ()

    def rules(effect: str) -> str:
        broken = Counter(violation.rule for violation in found if violation.effect == effect)
        return "; ".join(f"{rule} ({count} {'node' if count == 1 else 'nodes'})" for rule, count in broken.most_common())

    if moved := rules("inexact"):
        console.print(f"[yellow]{target} computes something else:[/yellow] {escape(moved)}{again}")
    if refused := rules("refused"):
        raise TargetRuleError(f"{output}: is written, but {target} refuses it: {refused}{again}")
