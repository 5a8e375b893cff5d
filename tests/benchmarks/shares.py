"""Processor time of a learning step in one process, and in each of several that share its mini-batch over gloo.

usage: python -m tests.benchmarks.shares --out RESULTS.json [--blocks basic,...] [--count 2] [--batch 32] [--iterations 10] [--rounds 5]

Processor time leaves out the waiting for the others: it says how far the work is divided, not how fast a network is.
"""

import dataclasses
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.benchmarks import step
from toolchain import report
from toolchain.cpu import keep_freed_memory
from toolchain.processes import Processes


def timed(rank: int, count: int, port: int, block: str, batch: int, iterations: int, rounds: int, out: str) -> None:
    """One of `count` processes; the first writes its milliseconds of an iteration, for each round."""
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        s = step.setting(step.DESIGNS[block], Path(folder), batch, iterations)
    processes = Processes(rank, count)
    run = step.ours(dataclasses.replace(s, unit=dataclasses.replace(s.unit, processes=processes)), True)
    times = []
    with processes.joined(torch.device("cpu")):
        for _ in range(rounds + 1):
            start = time.process_time()
            run()
            times.append((time.process_time() - start) / iterations * 1e3)
    if rank == 0:
        Path(out).write_text(json.dumps(times[1:]))  # the first round warms up


def main() -> None:
    """Time, write, print a Markdown table."""
    parser = step.arguments(__doc__)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for block in args.blocks.split(","):
        found = {}
        for count in (1, args.count):
            with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
                probe.bind(("localhost", 0))
                port, out = probe.getsockname()[1], str(Path(folder) / "times.json")
                probe.close()
                mp.spawn(timed, (count, port, block, args.batch, args.iterations, args.rounds, out), count)  # pyright: ignore[reportPrivateImportUsage]
                found[count] = statistics.median(json.loads(Path(out).read_text()))
        share = round(found[args.count] / found[1], 3)
        rows.append({"block": block, "batch": args.batch, "processes": args.count, "milliseconds": found, "share": share})
    args.out.write_text(json.dumps({"rows": rows, "environment": report.environment("cpu")}, indent=1) + "\n")
    print(f"| block | batch | one process, ms | each of {args.count}, ms | share |\n|" + "---|" * 5)
    for row in rows:
        alone, each = row["milliseconds"].values()
        print(f"| {row['block']} | {row['batch']} | {alone:.1f} | {each:.1f} | {row['share']:.2f} |")


if __name__ == "__main__":
    main()
