"""Processor time of a run against the depth of the model at fixed width, and against the number of blocks in a unit.

usage: python -m tests.benchmarks.growth --out RESULTS.json [--depths 8,16,32,64] [--joined 1,2,4] [--iterations 20]

The model is a stem, residual blocks of 16 channels on 16x16 images, and a head. Linear growth shows as a constant time for each further
block. Times are of the processor, on one thread, the fewest of three runs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests import zoo
from toolchain import report
from toolchain.config import Config
from toolchain.cpu import keep_freed_memory
from toolchain.pipeline import quantize
from toolchain.source import SourceModel

SAMPLES = 64
ROUNDS = 3


def chain(depth: int, folder: Path) -> SourceModel:
    """Residual blocks in a row."""
    b = zoo.Builder({"x": ["N", 3, 16, 16]})
    x = b.conv("x", 3, 16, act="relu")
    for _ in range(depth):
        x = b.op("Relu", b.op("Add", b.conv(b.conv(x, 16, 16, act="relu"), 16, 16), x))
    return zoo.loaded(b.model(b.head(x, 16)), folder)


def seconds(source: SourceModel, config: Config) -> float:
    """Fewest processor seconds of a run."""
    samples, times = zoo.images(SAMPLES, (3, 16, 16)), []
    for _ in range(ROUNDS):
        start = time.process_time()
        quantize(source, samples, config)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Time, write the results, print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depths", default="8,16,32,64")
    parser.add_argument("--joined", default="1,2,4")
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {"environment": report.environment("cpu"), "samples": SAMPLES, "iterations": args.iterations}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for depth in map(int, args.depths.split(",")):
            found = seconds(chain(depth, Path(folder)), Config(device="cpu", iterations=args.iterations, units="none"))
            further = (found - rows[-1]["seconds"]) / (depth - rows[-1]["blocks"]) if rows else None
            rows.append({"blocks": depth, "seconds": round(found, 3), "for_each_further_block": further and round(further, 4)})
        source, joined = chain(8, Path(folder)), []
        for size in map(int, args.joined.split(",")):
            merges = tuple("+".join(f"b{i + k:02d}" for k in range(size)) for i in range(1, 9, size)) if size > 1 else ()
            config = Config(
                device="cpu", iterations=args.iterations, units="manual" if merges else "none", merge=merges, max_group=max(size, 3)
            )
            joined.append({"blocks_in_a_unit": size, "seconds": round(seconds(source, config), 3)})
    results |= {"depth": rows, "joined": joined}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for table in (rows, joined):
        print(f"\n| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}")
        print("\n".join(f"| {' | '.join(map(str, row.values()))} |" for row in table))


if __name__ == "__main__":
    main()
