"""Where the time of a learning step goes, by torch's profiler: our loop beside its floor.

usage: python -m tests.benchmarks.step_profile --out RESULTS.json [--blocks basic,...] [--batch 32] [--iterations 10]

Milliseconds of an iteration on one thread, each with all that it calls; the profiler itself adds a few percent.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.benchmarks import step
from toolchain import report
from toolchain.cpu import keep_freed_memory
from toolchain.fake_quant import Coins
from toolchain.minibatch import Draw
from toolchain.rounding_learning import LearnedRounding

# What the profiler calls it -> what the table calls it.
PARTS = {
    "aten::conv2d": "convolutions, forward",
    "autograd::engine::evaluate_function: ConvolutionBackward0": "convolutions, backward",
    "aten::hardtanh": "Clip, forward",
    "autograd::engine::evaluate_function: HardtanhBackward0": "Clip, backward",
    "aten::relu": "Relu, forward",
    "autograd::engine::evaluate_function: ReluBackward0": "Relu, backward",
    "LearnedStep": "activation quantizers, forward",
    "autograd::engine::evaluate_function: LearnedStepBackward": "activation quantizers, backward",
    "batch": "gathering and mixing the mini-batch",
    "weights": "soft weights, their gradient and regulariser",
    "Optimizer.step#Adam.step": "Adam",
}
NESTED = {"coins": "of these, tossing coins"}


def profiled(run: Callable[[], None], iterations: int) -> dict[str, float]:
    """Milliseconds of an iteration by part; `total` is all of it, `rest` what no part has."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("total"):
        run()
    times: dict[str, float] = {}
    for event in found.events() or ():
        if event.cpu_parent is None or event.cpu_parent.name != event.name:  # some operators call themselves under the same name
            times[event.name] = times.get(event.name, 0.0) + event.cpu_time_total / iterations / 1e3
    parts = {name: times[key] for key, name in PARTS.items() if key in times}
    rest = times["total"] - sum(parts.values())
    nested = {name: times[key] for key, name in NESTED.items() if key in times}
    return {name: round(value, 2) for name, value in (parts | {"rest": rest, "total": times["total"]} | nested).items()}


def labelled(stack: ExitStack, owner: type, name: str, label: str) -> None:
    """Show the calls of a method to the profiler."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(label):
            return original(*arguments, **named)

    stack.enter_context(mock.patch.object(owner, name, call))


def table(rows: list[dict[str, Any]]) -> str:
    """Parts by blocks: ours, and the floor's in brackets."""
    names = [*PARTS.values(), "rest", "total", *NESTED.values()]
    lines = ["| ms | " + " | ".join(f"{row['block']}, {row['batch']}" for row in rows) + " |", "|" + "---|" * (len(rows) + 1)]
    for name in names:
        cells = [row["ours"].get(name, 0.0) for row in rows]
        floors = [row["floor"].get(name) for row in rows]
        texts = [f"{ours:.1f}" + (f" ({floor:.1f})" if floor is not None else "") for ours, floor in zip(cells, floors, strict=True)]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Profile, add to the results file, print a Markdown table."""
    parser = step.arguments(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    with ExitStack() as stack:
        for name in ("gathered", "mixed"):
            labelled(stack, Draw, name, "batch")
        labelled(stack, Coins, "toss", "coins")
        for name in ("soft_weights", "set_gradient", "state"):
            labelled(stack, LearnedRounding, name, "weights")
        for name in args.blocks.split(","):
            with tempfile.TemporaryDirectory() as folder:
                s = step.setting(step.DESIGNS[name], Path(folder), args.batch, args.iterations)
                found = {what: profiled(run, args.iterations) for what, run in (("ours", step.ours(s, True)), ("floor", step.floor(s)))}
            rows.append({"block": name, "batch": args.batch, **found})
    args.out.write_text(json.dumps({"rows": rows, "environment": report.environment("cpu")}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
