"""What the rows of `accuracy.py` say of the poster's claims on oscillation and on equivalent neighbours, without running anything.

usage: python -m tests.benchmarks.claims RESULTS.json [RESULTS.json ...]

Prints a Markdown table: the drops of the loss from unit to unit; where a method was run with units by loss too (MRECG), also its drops over
the blocks alone at which those units end; the largest loss before the last unit, the last one, and how many pairs of equivalent neighbours
do not fall (Theorem 1; of blocks alone).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.capacity import oscillation
from toolchain.study import equivalent_neighbours, final_losses

COLUMNS = (
    "model",
    "precision",
    "method",
    "units",
    "drops",
    "drops at MRECG's ends",
    "largest earlier loss",
    "last loss",
    "neighbours",
    "top-1",
)


def line(row: Mapping[str, Any], joined: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The cells of one row; `joined` is the same method's with units by loss."""
    losses, layers = final_losses(row), row["method"] in ("adaround", "adaquant", "bit-split")
    ends = {unit.split("+")[-1] for unit in joined["learned_units"]} if joined is not None else set()
    there = [loss for unit, loss in zip(row["learned_units"], losses, strict=True) if unit in ends]
    alone = len(row["units"]) == len(row["blocks"]) and not layers
    pairs = equivalent_neighbours(row) if alone else []
    return (
        row["model"],
        row["precision"],
        row["method"],
        str(len(row["learned_units"])),
        f"{oscillation(losses):.4g}",
        f"{oscillation(there):.4g}" if joined is not None and joined is not row else "",
        f"{max(losses[:-1]):.4g}",
        f"{losses[-1]:.4g}",
        f"{sum(pair['rises'] for pair in pairs)} of {len(pairs)}" if pairs else "",
        f"{row['top1']:.2f}",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    rows = [row for path in parser.parse_args().results for row in json.loads(path.read_text())["rows"] if row["learned_units"]]
    same = ("model", "precision", "seed", "iterations", "batch_size", "first_last", "calibration_samples")
    by_terms = {(*(row[key] for key in same), row["method"]): row for row in rows}
    print("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), sep="\n")
    for key, row in by_terms.items():
        joined = by_terms.get((*key[:-1], f"mrecg+{row['method']}"))
        print("| " + " | ".join(line(row, joined)) + " |")


if __name__ == "__main__":
    main()
