"""`mrecg-onnx check`: the rules of a runtime's parser, held against a file from any tool."""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from ..errors import TargetRuleError, UnsupportedModelError, UsageError, near_misses
from .endings import reported
from .options import EXIT_CODES, PATH, Option

if TYPE_CHECKING:
    from exporters.check import Violation

_SHOWN = {"refused": ("error", "red"), "inexact": ("inexact", "magenta"), "slow": ("slow", "yellow")}
_NAMED = 3  # nodes of one rule, without --verbose


@click.command(epilog=EXIT_CODES, short_help="Hold a QDQ file of any tool against a runtime's rules.")
@click.argument("file", type=PATH)
@click.option(
    "--target", cls=Option, required=True, metavar="tensorrt|openvino|qnn|ort-cpu|portable", help="Runtime whose rules are checked."
)
@click.option("-v", "--verbose", is_flag=True, help="Name every node of each rule, and show tracebacks.")
def check(file: Path, target: str, verbose: bool) -> None:
    """Check FILE, a QDQ model from any tool, against the rules that a runtime's parser documents; name each violation and its node.

    For ort-cpu the file is loaded too: what ONNX Runtime then computes in float is named with the reason.
    """
    with reported(verbose):
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        from exporters import check as rules

        from ..normalise import read

        if target not in rules.CHECKED:
            raise UsageError(f"--target {target}: must be one of {', '.join(rules.CHECKED)}{near_misses(target, rules.CHECKED)}")
        found = rules.check(read(file), target)
        if target == "ort-cpu" and not any(violation.is_error for violation in found):
            found = (*found, *_as_loaded(file, {violation.node for violation in found}))
        console = Console(highlight=False)
        for line in _lines(found, verbose):
            console.print(line)
        refused, inexact, slow = (_nodes(found, effect) for effect in rules.EFFECTS)
        if refused:
            raise TargetRuleError(f"{file}: breaks the rules of {target} at {refused}")
        moved = "".join(f"; {count} {what}" for count, what in ((inexact, "computed otherwise"), (slow, "at the cost of speed")) if count)
        console.print(f"{escape(file.name)} keeps to the rules of {target}{moved}")


def _as_loaded(file: Path, named: AbstractSet[str]) -> "Iterator[Violation]":
    """What ONNX Runtime says of a file, or the operators, other than those named already, that it computes in float."""
    from exporters.check import Violation

    from .. import runtime
    from ..float_operators import float_operators
    from ..wording import unnamed

    try:
        operators = float_operators(runtime.optimized(file))
    except UnsupportedModelError as error:
        yield Violation("", "", str(error))
        return
    for row in operators:
        if row.node not in named:
            reason, value = unnamed(row.reason)
            yield Violation(row.node, row.op_type, f"runs in float: {reason}", "slow", value)


def _lines(found: "Iterable[Violation]", verbose: bool) -> Iterator[str]:
    """One line for each rule and kind of node; where they are several, their names below it."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for v in found:
        alike.setdefault((v.effect, v.op_type, v.rule), []).append(f"{v.node} ({v.value})" if v.value else v.node)
    for (effect, kind, rule), nodes in alike.items():
        word, colour = _SHOWN[effect]
        shown = nodes if verbose else nodes[:_NAMED]
        where, names = f"{len(nodes)} {kind}", shown + [f"and {len(nodes) - len(shown)} more (-v names them)"] * (len(nodes) > len(shown))
        if len(nodes) == 1:
            where, names = f"{kind} {nodes[0]}".strip(), []
        yield f"[{colour}]{word}:[/{colour}] " + escape("\n    ".join([f"{where}: {rule}" if where else rule, *names]))


def _nodes(found: "Iterable[Violation]", effect: str) -> str:
    """How many nodes have an effect, in words; empty for none."""
    count = len({violation.node for violation in found if violation.effect == effect})
    return f"{count} {'node' if count == 1 else 'nodes'}" if count else ""
