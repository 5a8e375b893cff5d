"""`mrecg-onnx check`: the rules of a runtime's parser, held against a file from any tool."""

from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..errors import TargetRuleError, UsageError, near_misses
from .endings import reported
from .options import EXIT_CODES, PATH


@click.command(epilog=EXIT_CODES)
@click.argument("file", type=PATH)
@click.option("--target", required=True, metavar="tensorrt|openvino|qnn|ort-cpu|portable", help="Runtime whose rules are checked.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def check(file: Path, target: str, verbose: bool) -> None:
    """Check FILE, a QDQ model from any tool, against the rules that a runtime's parser documents; name each violation and its node."""
    with reported(verbose):
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        from exporters import check as rules

        from ..normalise import read

        if target not in rules.CHECKED:
            raise UsageError(f"--target {target}: must be one of {', '.join(rules.CHECKED)}{near_misses(target, rules.CHECKED)}")
        found = rules.check(read(file), target)
        console = Console(highlight=False)
        for violation in found:
            colour = "red" if violation.is_error else "yellow"
            where = " ".join(part for part in (violation.op_type, violation.node) if part)
            console.print(f"[{colour}]{'error' if violation.is_error else 'slow'}:[/{colour}] {escape(where)}: {escape(violation.rule)}")
        errors = sum(violation.is_error for violation in found)
        if errors:
            raise TargetRuleError(f"{file}: {errors} nodes break the rules of {target}")
        console.print(f"{escape(file.name)} keeps to the rules of {target}; {len(found)} nodes cost speed")
