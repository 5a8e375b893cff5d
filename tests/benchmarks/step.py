"""Time one learning step of a block against its floor and against a plainly written loop, on the same block, batch and iterations.

usage: python -m tests.benchmarks.step --out RESULTS.json [--blocks basic,bottleneck,...] [--batch 32] [--iterations 20] [--rounds 7]
           [--device cuda --iterations 1000]

- floor: forward and backward of the float block on one fixed batch, with gradients of its weights; same layout, nothing else.
- ours: `reconstruction.reconstruct_unit`'s learning loop, QDrop, everything in it, quantizers compiled.
- single: the same with quantizers as single operations, as where there is no C++ compiler.
- plain: the loop as the papers' codes write it (modules, autograd through the soft rounding and the LSQ quantizer, `torch.where` on
  `torch.rand`, a regulariser over the layers, contiguous layout), as `PlainBlock` below.

Times are of the processor (one thread), not of the clock, and the rounds of all are interleaved: other processes then meet all alike. On
CUDA they are of the clock, until the device is done; ours is captured as a graph there, "single" is not, and as many iterations as a run
has should share the time that capturing takes.

Figures are medians over the rounds, ratios medians of each round's ratio. No loop is faster than the floor: plain / floor bounds
plain / ours.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

from tests import zoo
from toolchain import reconstruction, report
from toolchain.activations import TorchModel, unpacked
from toolchain.config import Config
from toolchain.cpu import keep_freed_memory
from toolchain.device import full_float32
from toolchain.grids import biases_of, calibrate, with_biases
from toolchain.losses import loss_of
from toolchain.placement import place
from toolchain.samples import Samples
from toolchain.source import infer_types, load_source
from toolchain.survey import survey
from toolchain.torch_import import TorchBlock
from toolchain.unit import Unit, learned_weights

CACHED = 64  # samples that batches are drawn from


@dataclass(frozen=True)
class Layer:
    """A convolution of the plain block, in ONNX order."""

    inp: int
    out: int
    kernel: int
    group: int = 1
    act: str | None = None


@dataclass(frozen=True)
class Design:
    """A block: its layers in a row, a shortcut around them or not, an activation at the end or not, and its input's image size."""

    layers: tuple[Layer, ...]
    size: int
    shortcut: bool = True
    act: str | None = None


DESIGNS = {
    # ResNet-18 layer1 and ResNet-50 layer1 at a quarter of their image size, MobileNetV2 features.5 at its own, a 5x5 depthwise stage
    "basic": Design((Layer(64, 64, 3, act="relu"), Layer(64, 64, 3)), 14, act="relu"),
    "bottleneck": Design((Layer(256, 64, 1, act="relu"), Layer(64, 64, 3, act="relu"), Layer(64, 256, 1)), 14, act="relu"),
    "inverted residual": Design((Layer(32, 192, 1, act="relu6"), Layer(192, 192, 3, 192, "relu6"), Layer(192, 32, 1)), 28),
    "depthwise-heavy": Design((Layer(96, 96, 5, 96, "relu6"), Layer(96, 96, 1, act="relu6"), Layer(96, 96, 5, 96)), 14),
}


def model_of(design: Design) -> onnx.ModelProto:
    """The block alone as an ONNX model."""
    b = zoo.Builder({"x": ["N", design.layers[0].inp, design.size, design.size]})
    y = "x"
    for layer in design.layers:
        y = b.conv(y, layer.inp, layer.out, layer.kernel, group=layer.group, act=layer.act)
    y = b.op("Add", y, "x") if design.shortcut else y
    return b.model(b.activation(y, design.act))


@dataclass(frozen=True)
class Setting:
    """A block with calibrated grids and cached activations: what every loop starts from."""

    model: TorchModel
    unit: Unit


def setting(design: Design, folder: Path, batch: int, iterations: int, device: str = "cpu") -> Setting:
    """Import, calibrate and cache a block."""
    onnx.save(model_of(design), folder / "block.onnx")
    source = load_source(folder / "block.onnx")
    rng = np.random.default_rng(0)
    shape = (max(CACHED, batch), design.layers[0].inp, design.size, design.size)
    samples = Samples({"x": np.maximum(rng.normal(size=shape), 0).astype(np.float32)})
    config = Config(device=device, iterations=iterations, batch_size=batch)
    types = infer_types(source, samples.shapes, samples.inputs)
    (block,) = (row.block for row in survey(source, samples, config).rows)
    model = TorchModel.of(source, types, [block], torch.device(device))
    (piece,) = model.pieces
    assert isinstance(piece, TorchBlock)
    placement = place(source, types, config.scheme, config.precision, frozenset())
    table = calibrate(model, placement, samples.first(16), config).table
    floats, quantized = model.stream(samples.inputs), model.stream(samples.inputs, table)
    unit = Unit(
        piece=piece,
        weights=learned_weights(piece, table),
        biases=biases_of(placement, block),
        scores=placement.scores.values,
        floats=source.constants,
        inputs=quantized.of(block.inputs),
        float_inputs=floats.of(block.inputs),
        targets=model.run(piece, floats),
        passes=floats.passes,
        device=model.device,
        table=table,
        finish=lambda learned, biases=MappingProxyType({}): with_biases(source, placement, block, learned, biases),
        settings=config.settings(has_depthwise=True),
        seed=0,
        progress=_ignore,
    )
    return Setting(model, unit)


def floor(s: Setting) -> Callable[[], None]:
    """Forward and backward of the float block, nothing else."""
    fed, targets = s.unit.draw().batch(torch.arange(s.unit.settings.batch_size), None)
    constants = s.model.constants(s.unit.piece)
    weights = [tensor.requires_grad_() for name, tensor in constants.items() if tensor.dim() > 1]

    def run() -> None:
        for _ in range(s.unit.settings.iterations):
            loss_of(s.unit.piece(fed | constants), targets).backward()
            for weight in weights:
                weight.grad = None

    return run


def ours(s: Setting, is_whole: bool, is_narrow: bool = False) -> Callable[[], None]:
    """This project's learning loop, with all that makes it fast or without compiled quantizers and captured steps; products in bfloat16."""
    unit = replace(s.unit, is_compiled=is_whole, is_recorded=is_whole and s.unit.device.type == "cuda", is_narrow=is_narrow)
    return lambda: _ignore(reconstruction._learn(unit, unit.table))


def _ignore(*_: object) -> None:
    pass


class RoundSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0]


class PlainActivation(nn.Module):
    """QDrop's activation quantizer: LSQ through autograd, elements left unquantized at random."""

    def __init__(self, scale: float, zero_point: int, low: int, high: int, probability: float) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(scale))
        self.zero_point, self.low, self.high, self.probability = zero_point, low, high, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.clamp(RoundSte.apply(x / self.step) + self.zero_point, self.low, self.high)
        quantized = (codes - self.zero_point) * self.step
        return torch.where(torch.rand_like(x) < self.probability, quantized, x)


class PlainConv(nn.Module):
    """A convolution with AdaRound's weight quantizer, its activation, and the quantizer of what comes out."""

    def __init__(self, layer: Layer, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, low: int, high: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", torch.tensor(scale).reshape(-1, 1, 1, 1))
        scaled = torch.tensor(weight) / self.get_buffer("scale")
        self.register_buffer("base", torch.floor(scaled))
        rest = scaled - torch.floor(scaled)
        self.alpha = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1))
        self.register_buffer("bias", torch.tensor(bias))
        self.low, self.high = low, high
        self.quantizer: nn.Module = nn.Identity()

    def soft(self) -> torch.Tensor:
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.clamp(self.get_buffer("base") + self.soft(), self.low, self.high) * self.get_buffer("scale")
        x = F.conv2d(x, weight, self.get_buffer("bias"), padding=self.layer.kernel // 2, groups=self.layer.group)
        x = {"relu": F.relu, "relu6": F.relu6, None: lambda y: y}[self.layer.act](x)
        return self.quantizer(x)


class PlainBlock(nn.Module):
    """The block of modules, made from the same grids."""

    def __init__(self, design: Design, s: Setting) -> None:
        super().__init__()
        self.design = design
        nodes = [node for node in s.unit.piece.block.nodes if node.op_type == "Conv"]
        constants, keep = s.model.source.constants, s.unit.settings.keep_probability

        def activation(name: str) -> nn.Module:
            if name not in s.unit.table:
                return nn.Identity()
            grid = s.unit.table[name]
            return PlainActivation(float(grid.scale), int(grid.zero_point), grid.spec.qmin, grid.spec.qmax, keep)

        self.convs = nn.ModuleList()
        for layer, node in zip(design.layers, nodes, strict=True):
            grid = s.unit.table[node.inputs[1]]
            weight, bias = (constants[name] for name in node.inputs[1:])
            conv = PlainConv(layer, weight, bias, np.asarray(grid.scale), grid.spec.qmin, grid.spec.qmax)
            readers = s.model.source.graph.readers_of(node.outputs[0])
            conv.quantizer = activation(readers[0].outputs[0] if layer.act else node.outputs[0])
            self.convs.append(conv)
        self.out = activation(s.unit.piece.block.outputs[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        y = y + x if self.design.shortcut else y
        return self.out(F.relu(y) if self.design.act == "relu" else y)


def plain(design: Design, s: Setting) -> Callable[[], None]:
    """QDrop's reconstruction loop."""
    quantized, floats, targets = (unpacked(next(iter(d.values()))) for d in (s.unit.inputs, s.unit.float_inputs, s.unit.targets))
    assert isinstance(quantized, torch.Tensor)
    assert isinstance(floats, torch.Tensor)
    assert isinstance(targets, torch.Tensor)
    quantized, floats, targets = quantized.contiguous(), floats.contiguous(), targets.contiguous()
    settings = s.unit.settings

    def run() -> None:
        block = PlainBlock(design, s).to(s.unit.device)
        steps = [m.step for m in block.modules() if isinstance(m, PlainActivation)]
        weight_optimizer = torch.optim.Adam([conv.alpha for conv in block.convs], lr=settings.weight_lr)  # pyright: ignore
        step_optimizer = torch.optim.Adam(steps, lr=4e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step_optimizer, T_max=settings.iterations)
        for iteration in range(settings.iterations):
            rows = torch.randperm(len(quantized))[: settings.batch_size]
            x, target = quantized[rows], targets[rows]
            x = torch.where(torch.rand_like(x) < settings.keep_probability, x, floats[rows])
            weight_optimizer.zero_grad()
            step_optimizer.zero_grad()
            out = block(x)
            loss = (out - target).pow(2).sum(1).mean()
            beta = reconstruction._beta(iteration, settings)
            if beta is not None:
                for conv in block.convs:
                    loss = loss + settings.round_weight * (1 - ((conv.soft() - 0.5).abs() * 2).pow(beta)).sum()  # pyright: ignore
            loss.backward()
            weight_optimizer.step()
            step_optimizer.step()
            schedule.step()

    return run


def measured(contenders: dict[str, Callable[[], None]], rounds: int, iterations: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds per iteration of each, for each round: the processor's, or those until a device is done."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            start = now()
            run()
            if index:  # the first round warms up
                times[name].append((now() - start) / iterations * 1e3)
    return times


def table(rows: list[dict[str, Any]]) -> str:
    heads = "block", "batch", "floor ms", "ours ms", "amp ms", "plain ms", "ours / floor", "amp / floor", "single / floor"
    heads = *heads, "plain / ours", "plain / amp", "plain / floor"
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        ms = row["milliseconds"]
        figures = [f"{ms[name]:.1f}" if name in ms else "-" for name in ("floor", "ours", "amp", "plain")]
        ratios = "over_floor", "amp_over_floor", "single_over_floor", "speedup", "amp_speedup", "plain_over_floor"
        figures += [f"{row[ratio]:.2f}" if ratio in row else "-" for ratio in ratios]  # rows of before --amp have none of it
        lines.append(f"| {row['block']} | {row['batch']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def arguments(description: str | None, iterations: int = 10, is_written: bool = True) -> argparse.ArgumentParser:
    """What every benchmark of steps is asked: blocks, batch, iterations, and the results file, which may be one that must be named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=is_written)
    parser.add_argument("--blocks", default=",".join(DESIGNS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=iterations)
    return parser


@full_float32()
def main() -> None:
    """Time, add to the results file, print a Markdown table."""
    parser = arguments(__doc__, is_written=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {"rows": []}
    if args.out is not None and args.out.exists():
        results = json.loads(args.out.read_text())
    results["environment"] = report.environment(args.device)
    for name in args.blocks.split(","):
        design = DESIGNS[name]
        with tempfile.TemporaryDirectory() as folder:
            s = setting(design, Path(folder), args.batch, args.iterations, args.device)
            contenders = {
                "floor": floor(s),
                "ours": ours(s, True),
                "amp": ours(s, True, is_narrow=True),
                "single": ours(s, False),
                "plain": plain(design, s),
            }
            times = measured(contenders, args.rounds, args.iterations, args.device)
        ms = {key: statistics.median(values) for key, values in times.items()}
        row = {
            "block": name,
            "batch": args.batch,
            "threads": 1,
            "milliseconds": {key: round(value, 3) for key, value in ms.items()},
            "over_floor": round(statistics.median(a / b for a, b in zip(times["ours"], times["floor"], strict=True)), 3),
            "amp_over_floor": round(statistics.median(a / b for a, b in zip(times["amp"], times["floor"], strict=True)), 3),
            "single_over_floor": round(statistics.median(a / b for a, b in zip(times["single"], times["floor"], strict=True)), 3),
            "plain_over_floor": round(statistics.median(a / b for a, b in zip(times["plain"], times["floor"], strict=True)), 3),
            "speedup": round(statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True)), 3),
            "amp_speedup": round(statistics.median(a / b for a, b in zip(times["plain"], times["amp"], strict=True)), 3),
        }
        results["rows"] = [old for old in results["rows"] if (old["block"], old["batch"]) != (name, args.batch)] + [row]
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
