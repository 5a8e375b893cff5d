"""`mrecg-onnx export`: a finished table for another target, without learning again."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..errors import TargetRuleError, UsageError, near_misses
from ..scheme import TARGETS
from .endings import reported
from .files import check_loads, check_output
from .options import EXIT_CODES, PATH, Option

if TYPE_CHECKING:
    import onnx


@click.command(epilog=EXIT_CODES, short_help="Write a learned table for another target.")
@click.argument("model", type=PATH)
@click.argument("table", type=PATH)
@click.option(
    "--target", cls=Option, metavar="|".join(TARGETS), help="Runtime to export for. Default: the one that the table was learned for."
)
@click.option("--storage", cls=Option, metavar="fast|small", help="How weights below 8 bits are stored. Default: the target's.")
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
def export(
    model: Path, table: Path, target: str | None, storage: str | None, format_: str, output: Path, overwrite: bool, verbose: bool
) -> None:
    """Write MODEL with the grids of TABLE, for another target, without learning again.

    TABLE is what `quantize --encodings` wrote, or a file of AIMET encodings (1.0.0 or 0.6.1), whose weights are rounded to nearest.
    """
    with reported(verbose):
        for name, value, known in (
            ("--target", target, tuple(TARGETS)),
            ("--storage", storage, ("fast", "small")),
            ("--format", format_, ("onnx", "aimet")),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value}: must be one of {', '.join(known)}{near_misses(value, known)}")
        check_output(model, output, overwrite)
        _export(model, table, target, storage, format_, output, Console(highlight=False))


def _export(model: Path, table_file: Path, target: str | None, storage: str | None, format_: str, output: Path, console: Console) -> None:
    from exporters import aimet, export_qdq, write_model
    from exporters.qdq import write_text

    from .. import encodings
    from ..normalise import read
    from ..scheme import scheme_for
    from ..source import folded_values, load_source

    try:
        text = table_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{table_file}: cannot be read: {error}") from error
    source = load_source(model)
    learned_for = None
    if '"activation_encodings"' in text:
        axes = {name: stored.axis for name, stored in source.stored.items()}
        axes |= {weight: source.channel_axis(node) for node in source.graph.weighted if (weight := source.graph.weight(node)) is not None}
        whole, data = read(model), aimet.loads(text, str(table_file))
        folded = aimet.entries_of(data, str(table_file)) & folded_values(source, whole)
        if folded:
            console.print(f"left out, since loading folds these values away: {escape(', '.join(sorted(folded)))}")
        table = aimet.from_aimet(data, source.constants, axes, str(table_file), folded)
        table = aimet.with_copies(whole, table)
    else:
        loaded = encodings.loads(text, str(table_file))
        table, learned_for = loaded.table, loaded.target
        if loaded.source_sha256 != source.sha256:
            raise UsageError(
                f"{table_file}: was learned on another model (SHA-256 {loaded.source_sha256[:12]}, {model} has {source.sha256[:12]})"
            )
    known = {*source.constants, *source.graph.inputs, *source.graph.producer, *table.copies}
    stray = next((name for name in table if name not in known), None)
    if stray is not None:
        raise UsageError(f"{table_file}: {model} has no value {stray!r}{near_misses(stray, known)}")
    scheme = scheme_for(target or learned_for or "ort-cpu", None, None, storage)
    if learned_for is not None and learned_for in TARGETS and learned_for != scheme.name:
        console.print(f"learned for {learned_for}; {scheme.name} would have learned under other rules:")
        for difference in TARGETS[learned_for].differences(scheme):
            console.print(f"  {escape(difference)}")
    if format_ == "aimet":
        place = output.with_suffix(".encodings")
        write_model(aimet.with_rounded_weights(source.model, table), output)
        write_text(aimet.dumps(table), place)
        console.print(f"wrote {escape(str(output))} and {escape(str(place))}")
        return
    if learned_for is None:
        from ..grids import completed

        table = completed(source, table, scheme)
    metadata = {"version": __version__, "source_sha256": source.sha256, "target": scheme.name, "learned_for": learned_for or "another tool"}
    exported = export_qdq(source.model, table, metadata, scheme)
    check_loads(exported)
    write_model(exported, output)
    console.print(f"wrote {escape(str(output))} for {scheme.name}")
    _check_rules(exported, scheme.name, output, console)


def _check_rules(exported: "onnx.ModelProto", target: str, output: Path, console: Console) -> None:
    """Say what the runtime which a file is for computes otherwise or would not take, because its grids were learned under other rules."""
    from exporters import check

    found = check.check(exported, target) if target in check.CHECKED else ()

    def rules(effect: str) -> str:
        broken = Counter(violation.rule for violation in found if violation.effect == effect)
        return "; ".join(f"{rule} ({count} {'node' if count == 1 else 'nodes'})" for rule, count in broken.most_common())

    if moved := rules("inexact"):
        console.print(f"[yellow]{target} computes something else:[/yellow] {escape(moved)}; quantize with --target {target} instead")
    if refused := rules("refused"):
        raise TargetRuleError(f"{output}: is written, but {target} refuses it: {refused}; quantize with --target {target} instead")
