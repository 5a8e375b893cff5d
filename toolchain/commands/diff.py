"""`mrecg-onnx diff`: what a quantized file changed, or how two of them differ."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from ..errors import ExportError, UsageError
from .endings import reported
from .options import EXIT_CODES, PATH

if TYPE_CHECKING:
    import onnx

_MOST = 10  # constants that are listed, the worst first


@click.command(epilog=EXIT_CODES, short_help="What a quantized file changed, or how two of them differ.")
@click.argument("first", type=PATH)
@click.argument("second", metavar="QDQ", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("-v", "--verbose", is_flag=True, help="List every constant and value, and show tracebacks.")
def diff(first: Path, second: Path, as_json: bool, verbose: bool) -> None:
    """Say what QDQ, a quantized file of any tool, changed in FIRST, the float model.

    Quantizers and weights change, and nothing else, if all is well; any other change is named and gives exit code 5. If FIRST is quantized
    too, the grids and integers of the two are compared value by value.

    \b
    mrecg-onnx diff net.onnx net.w4a4.onnx
    mrecg-onnx diff ours.onnx theirs.onnx
    """
    with reported(verbose):
        for path in (first, second):
            if not path.is_file():
                raise UsageError(f"{path}: no such file")
        from exporters.diff import QdqGraph

        from ..normalise import read

        one, two = read(first), read(second)
        if not QdqGraph(two).is_quantized:
            raise UsageError(f"{second}: has no QuantizeLinear or DequantizeLinear; give the float model first")
        if QdqGraph(one).is_quantized:
            _show_grids(one, two, as_json, verbose)
        else:
            _show_changes(first, second, two, as_json, verbose)


def _show_changes(first: Path, second: Path, quantized: "onnx.ModelProto", as_json: bool, verbose: bool) -> None:
    from exporters.diff import compare

    from .. import report
    from ..source import load_source

    found = compare(load_source(first).model, quantized)
    constants = sorted(found.constants, key=lambda constant: constant.sqnr)
    if as_json:
        facts = {
            "values": {name: grid.kind for name, grid in found.values.items()},
            "constants": [dataclasses.asdict(constant) for constant in constants],
            "folded": list(found.folded),
            "unchanged_nodes": found.kept,
            "changes": list(found.changes),
        }
        click.echo(report.as_json(report.finite(facts)), nl=False)
    else:
        console = Console(highlight=False)
        console.print(f"{len(found.values)} values quantized ({_counted(grid.kind for grid in found.values.values())})")
        console.print(f"{len(constants)} constants changed ({_counted(constant.kind for constant in constants)})")
        for constant in constants if verbose else constants[:_MOST]:
            steps = f", {constant.steps:.2f} steps at most" if constant.steps is not None else ""
            noise = f"{constant.sqnr:.1f} dB" if constant.sqnr > float("-inf") else "was all zeros"
            console.print(f"  {escape(constant.name)}: {constant.kind}, {noise}{steps}")
        if found.folded:
            console.print(f"{len(found.folded)} Relu or Clip are done by a quantizer")
        console.print(f"{found.kept} nodes are unchanged")
        for change in found.changes:
            console.print(f"[red]changed:[/red] {escape(change)}")
    if found.changes:
        raise ExportError(f"{second}: {len(found.changes)} changes besides quantizers and weights")


def _show_grids(one: "onnx.ModelProto", two: "onnx.ModelProto", as_json: bool, verbose: bool) -> None:
    from exporters.diff import compare_grids

    from .. import report

    both, only_first, only_second = compare_grids(one, two)
    if as_json:
        facts = {"both": [dataclasses.asdict(change) for change in both], "only_first": only_first, "only_second": only_second}
        click.echo(report.as_json(report.finite(facts)), nl=False)
        return
    console = Console(highlight=False)
    coded = [change for change in both if change.codes_percent is not None]
    equal = sum(change.codes_percent == 0 for change in coded)
    console.print(f"{len(both)} values are quantized in both files; {equal} of {len(coded)} constants have the same integers")
    for change in both:
        is_same = change.first == change.second and abs(change.scale_ratio - 1) < 1e-5 and not change.codes_percent
        if is_same and not verbose:
            continue
        kinds = change.first if change.first == change.second else f"{change.first} and {change.second}"
        codes = f", {change.codes_percent:.3g} % of the integers differ, by {change.most} at most" if change.codes_percent else ""
        console.print(f"  {escape(change.name)}: {kinds}, scales 1 : {change.scale_ratio:.5g}{codes}")
    for names, which in ((only_first, "first"), (only_second, "second")):
        if names:
            shown = ", ".join(names if verbose else names[:_MOST])
            console.print(f"only in the {which}: {escape(shown)}{' ...' if len(names) > _MOST and not verbose else ''}")


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())
