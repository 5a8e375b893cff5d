"""`mrecg-onnx check`: the rules of a runtime's parser, held against a file from any tool."""

from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..errors import TargetRuleError, UsageError, near_misses
from .endings import reported
from .options import EXIT_CODES, PATH

_SHOWN = {"refused": ("error", "red"), "inexact": ("inexact", "magenta"), "slow": ("slow", "yellow")}


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
            where = " ".join(part for part in (violation.op_type, violation.node) if part)
            word, colour = _SHOWN[violation.effect]
            console.print(f"[{colour}]{word}:[/{colour}] {escape(where)}: {escape(violation.rule)}")
        count = Counter(violation.effect for violation in found)
        if count["refused"]:
            raise TargetRuleError(f"{file}: {count['refused']} nodes break the rules of {target}")
        moved = f", {count['inexact']} change results" if count["inexact"] else ""
        console.print(f"{escape(file.name)} keeps to the rules of {target}; {count['slow']} nodes cost speed{moved}")
