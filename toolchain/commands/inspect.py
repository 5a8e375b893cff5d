"""`mrecg-onnx inspect`: what is in a model, without data."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..config import Config
from ..errors import UsageError
from .endings import reported
from .options import EXIT_CODES, PATH, Option

_FILE_COLUMNS = 120  # of a table that is written to a file
_FORMATS = ("table", "json", "html", "svg", "png")


@click.command(epilog=EXIT_CODES, short_help="Blocks, capacities and proposed units; needs no data.")
@click.argument("model", type=PATH)
@click.option(
    "--input-shape", multiple=True, metavar="NAME:3x224x224", help="Shape of one sample of an input whose axes are open. Repeatable."
)
@click.option(
    "--units",
    cls=Option,
    metavar="modcap|transitions",
    default="modcap",
    show_default=True,
    help="Selector for the proposed units (data-free).",
)
@click.option(
    "--format",
    "format_",
    cls=Option,
    metavar="table|json|html|svg|png",
    help="A table, the facts, a page, or the picture of the blocks alone. Default: what --output ends in, else table.",
)
@click.option("-o", "--output", type=PATH, help="Write to this file instead of standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def inspect(model: Path, input_shape: tuple[str, ...], units: str, format_: str | None, output: Path | None, verbose: bool) -> None:
    """Show the blocks of MODEL, their capacities, the units proposed, and what stays float. Needs no data.

    \b
    mrecg-onnx inspect net.onnx
    mrecg-onnx inspect net.onnx -o net.html
    """
    with reported(verbose):
        ending = output.suffix.removeprefix(".").lower() if output is not None else ""
        format_ = format_ or (ending if ending in _FORMATS else "table")
        for name, value, known in (("--units", units, ("modcap", "transitions")), ("--format", format_, _FORMATS)):
            if value not in known:
                raise UsageError(f"{name} {value}: must be one of {', '.join(known)}")
        if format_ == "png" and output is None and sys.stdout.isatty():
            raise UsageError("--format png: is no text; give --output")
        from .. import report, survey, terminal
        from ..source import load_source

        source = load_source(model)
        shapes, guessed = survey.sample_shapes(source, dict(_shape(entry) for entry in input_shape))
        plan, islands = survey.inspect(source, shapes, Config(units=units))
        facts = {
            "model": {
                "path": str(model),
                "sha256": source.sha256,
                "opset": source.opset,
                "inputs": [str(spec) for spec in source.inputs],
                "notes": list(source.notes),
            },
            **report.plan_report(plan),
            "guessed_axes": guessed,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "islands": [dataclasses.asdict(row) for row in islands],
        }
        if format_ == "table" and output is None:
            terminal.show_inspection(Console(highlight=False), facts)
            return
        content = _drawn(facts, format_).encode("utf-8") if format_ != "png" else _png(facts)
        if output is None:
            click.echo(content, nl=False)
        else:
            report.write_bytes(output, content)


def _drawn(facts: dict[str, Any], format_: str) -> str:
    """What `inspect` found, as text of one format."""
    from .. import report, terminal
    from ..block_picture import block_picture
    from ..drawing import standalone
    from ..page import inspect_page

    if format_ == "html":
        return inspect_page(report.finite(facts))
    if format_ == "svg":
        return standalone(block_picture(facts).svg(), scale=2)
    if format_ == "json":
        return report.as_json(facts)
    console = Console(file=io.StringIO(), width=_FILE_COLUMNS, highlight=False, record=True)
    terminal.show_inspection(console, facts)
    return console.export_text()


def _png(facts: dict[str, Any]) -> bytes:
    from .. import plot
    from ..block_picture import block_picture

    return plot.png(block_picture(facts))


def _shape(entry: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = entry.rpartition(":")
    try:
        return name, tuple(int(d) for d in dims.split("x"))
    except ValueError:
        raise UsageError(f"--input-shape {entry!r}: expected NAME:3x224x224, one sample without the batch axis") from None
