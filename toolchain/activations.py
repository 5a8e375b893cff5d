"""A model imported to torch block by block, and the activations of a stream (float or quantized) that are moved through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import runtime
from .fake_quant import fake_quantize
from .graph import last_reads
from .islands import Island
from .memory import CPU, Room
from .packing import Packed, packings
from .partition import Block
from .quant_table import QuantTable, TensorQuant
from .source import SourceModel, ValueTypes
from .torch_import import TorchBlock, import_block

LARGEST_CHUNK = 64  # samples per forward pass at most,
_LARGEST = 1 << 25  # and floats of the largest value in it

Observer = Callable[[str, torch.Tensor], torch.Tensor]
Piece = TorchBlock | Island


class Parts(tuple[Any, ...]):
    """A value that is no array of samples [N, ...], as it was in each forward pass: a shape, [N * windows, ...], boxes, a string."""


Value = torch.Tensor | Packed | Parts


@dataclass(frozen=True)
class Passes:
    """How samples go through a model: `size` of `count` in each forward pass; `stacked` names the values that are arrays of samples.

    `room` is where values of all samples are kept, `float_type` what those are kept as that are on no grid.
    `device` is where they are computed with, wherever they are kept. `is_fixed`: the model takes so many together only.
    """

    count: int
    size: int
    stacked: AbstractSet[str]
    room: Room = field(default_factory=Room)
    float_type: torch.dtype = torch.float32
    device: torch.device = CPU
    is_fixed: bool = False

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size))

    def part(self, value: Value, index: int) -> Any:
        """A value as it is in one forward pass."""
        if isinstance(value, Parts):
            return value[index]
        rows = slice(index * self.size, (index + 1) * self.size)
        if isinstance(value, Packed):
            return value.packing.unpack(value.kept[rows].to(self.device))
        return value[rows].to(self.device)


class Collector:
    """Puts a value together from forward passes; arrays of samples are written into one tensor as they come, to hold them only once.

    Floats are packed where the value's grid, or the float type of the passes, allows it.
    """

    def __init__(self, passes: Passes, is_stacked: bool, grid: TensorQuant | None = None) -> None:
        self._passes = passes
        self._is_stacked = is_stacked
        self._packings = list(packings(grid, passes.float_type))
        self._parts: list[Any] = []
        self._whole: torch.Tensor | None = None

    def add(self, index: int, part: Any) -> None:
        """Take in the value of the next forward pass."""
        if not self._is_stacked or not isinstance(part, torch.Tensor):
            self._parts.append(part)
            return
        if part.dtype != torch.float32:
            self._packings = []
        start = index * self._passes.size
        end = min(start + self._passes.size, self._passes.count)
        if part.shape != (end - start, *(part if self._whole is None else self._whole).shape[1:]):
            # It only looked like an array of samples: its shape follows from data.
            self._parts = [*(self._passes.part(self.value, i) for i in range(index)), part]
            self._whole, self._is_stacked = None, False
            return
        kept = self._packings[0].pack(part) if self._packings else part
        while kept is None:  # not all of it is on the grid: keep it otherwise from here on, and what there is so far
            before = [self._passes.part(self.value, i) for i in range(index)]
            self._whole, self._packings = None, self._packings[1:]
            for i, earlier in enumerate(before):
                self.add(i, earlier)
            kept = self._packings[0].pack(part) if self._packings else part
        if self._whole is None:
            self._whole = self._passes.room.empty((self._passes.count, *part.shape[1:]), kept.dtype, part.device)
        self._whole[start:end] = kept

    @property
    def value(self) -> Value:
        if self._whole is None:
            return Parts(self._parts)
        return Packed(self._whole, self._packings[0]) if self._packings else self._whole


@dataclass(frozen=True)
class TorchModel:
    """The pieces of a model (blocks or units, and the islands between them) in execution order, on one device.

    `size` is the number of samples in a forward pass (see `chunk`), `room` where values of all samples are kept, `float_type` what floats
    are kept as.
    """

    source: SourceModel
    types: ValueTypes
    device: torch.device
    pieces: tuple[Piece, ...]
    size: int
    room: Room = field(default_factory=Room)
    float_type: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, source: SourceModel, types: ValueTypes, blocks: Sequence[Block], device: torch.device, size: int | None = None
    ) -> "TorchModel":
        pieces = tuple(
            Island(block, source, types, device) if block.is_island else import_block(source, types, block).to(device) for block in blocks
        )
        return cls(source, types, device, pieces, types.batch or size or chunk(types))

    def constants(self, piece: Piece, table: QuantTable | None = None) -> dict[str, torch.Tensor]:
        """A piece's weights and biases: the float ones, or (with a table) what their codes stand for."""
        return constants_of(piece.weights, self.source.constants, table, self.device)

    def stream(self, inputs: Mapping[str, np.ndarray], table: QuantTable | None = None) -> "ActivationCache":
        """Start a stream at the graph inputs: the float one, or (with a table) the quantized one."""
        axes = self.source.axes
        size = 1 if runtime.differing(inputs, axes) else self.size
        count, is_fixed = len(next(iter(inputs.values()), "1")), self.types.batch is not None
        passes = Passes(count, size, self.types.stacked, self.room, self.float_type, self.device, is_fixed)
        observe = quantizing(table) if table is not None else None
        values: dict[str, Value] = {}
        for name, array in inputs.items():
            is_stacked = axes[name] == 0 and array.dtype.kind not in "OSU"
            parts = (array[rows] if is_stacked else runtime.batched({name: array[rows]}, axes)[name] for rows in passes)
            collector = Collector(passes, is_stacked, table.tensors.get(name) if table is not None else None)
            for index, part in enumerate(parts):
                fed = self._fed(part)
                collector.add(index, fed if observe is None or not isinstance(fed, torch.Tensor) else observe(name, fed))
            values[name] = collector.value
        return ActivationCache(values, last_reads([piece.block.nodes for piece in self.pieces], self.source.graph), passes)

    def run(
        self, piece: Piece, cache: "ActivationCache", table: QuantTable | None = None, observe: Observer | None = None
    ) -> dict[str, Value]:
        """A piece's outputs over all samples, in float or (with a table) quantized; `observe` as in `run_piece`."""
        return run_piece(piece, cache.of(piece.block.inputs), self.constants(piece, table), cache.passes, observe, table)

    def _fed(self, array: np.ndarray) -> Any:
        return array if array.dtype.kind in "OSU" else torch.from_numpy(np.array(array)).to(self.device)


class ActivationCache:
    """The live values of a stream by ONNX name, each a tensor of all samples [N, ...], packed or not, or its parts.

    Each piece is run once, and what nothing later reads is freed.
    """

    def __init__(self, values: Mapping[str, Value], dead_after: Sequence[frozenset[str]], passes: Passes) -> None:
        self._values = dict(values)
        self._dead_after = dead_after
        self.passes = passes

    def fork(self) -> "ActivationCache":
        """The stream as it is now, to be advanced on its own; no value is copied."""
        return ActivationCache(self._values, self._dead_after, self.passes)

    def of(self, names: Iterable[str]) -> dict[str, Value]:
        return {name: self._values[name] for name in names}

    def advance(self, outputs: Mapping[str, Value]) -> None:
        """Take in the outputs of the next piece and drop the values that nothing after it reads."""
        self._values.update(outputs)
        dead, *self._dead_after = self._dead_after
        for name in dead:
            self._values.pop(name, None)


def chunk(types: ValueTypes) -> int:
    """Samples in a forward pass: as many as keep a processor busy, and no more than the caches and the memory take well."""
    return min(max(_LARGEST // max(types.largest(types.stacked), 1), 1), LARGEST_CHUNK)


def observed(name: str, value: Value, observe: Observer) -> Value:
    """A value, or each of its parts, as an observer hands it back; what is no tensor is not shown to it."""
    if isinstance(value, Parts):
        return Parts(observe(name, part) if isinstance(part, torch.Tensor) else part for part in value)
    return observe(name, value.floats() if isinstance(value, Packed) else value)


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """Images channels last: 2-4 times faster convolutions on CPUs, and what tensor cores want."""
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def constants_of(
    names: Iterable[str], floats: Mapping[str, np.ndarray], table: QuantTable | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Weights and biases by name: what a table's codes stand for, or the float ones where it has none."""
    arrays = {name: table[name].dequantized() if table is not None and name in table else floats[name] for name in names}
    return {name: laid_out(torch.tensor(array)).to(device) for name, array in arrays.items()}


def quantizing(table: QuantTable) -> Observer:
    """The observer of the quantized stream: fake-quantize what the table has an activation grid for.

    A tied value is on its grid already, since data movement changes no element.
    """

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        grid = table.tensors.get(name)
        return tensor if grid is None or grid.codes is not None or grid.tied_to is not None else fake_quantize(tensor, grid)

    return observe


@torch.no_grad()
def run_piece(
    piece: Piece,
    inputs: Mapping[str, Value],
    constants: Mapping[str, torch.Tensor],
    passes: Passes,
    observe: Observer | None = None,
    table: QuantTable | None = None,
) -> dict[str, Value]:
    """Run a piece over all samples, pass by pass.

    Args:
        piece: the block, unit or island.
        inputs: its inputs by name.
        constants: its weights and biases by name, quantized already where they should be.
        passes: how the samples are split.
        observe: called on every value that the piece makes; what it returns takes the value's place. Default: `table` quantizes it.
        table: the grids that these values are quantized on, whose codes are then kept.
    """
    grids = table.tensors if table is not None else {}
    outputs = {name: Collector(passes, name in passes.stacked, grids.get(name)) for name in piece.block.outputs}
    observe = quantizing(table) if observe is None and table is not None else observe
    for index, _ in enumerate(passes):
        part = {name: passes.part(value, index) for name, value in inputs.items()}
        for name, made in _made(piece, part, constants, passes, observe).items():
            outputs[name].add(index, made)
    return {name: whole.value for name, whole in outputs.items()}


def _made(
    piece: Piece, part: Mapping[str, Any], constants: Mapping[str, torch.Tensor], passes: Passes, observe: Observer | None
) -> dict[str, Any]:
    """The outputs of a forward pass; where the device's memory does not hold it, of its halves one after the other."""
    try:
        return piece({**part, **constants}, observe)
    except torch.OutOfMemoryError:
        size = max((len(value) for value in part.values() if isinstance(value, torch.Tensor) and value.dim()), default=0)
        if size < 2 or passes.is_fixed or not {*part, *piece.block.outputs} <= passes.stacked:
            raise  # one sample alone, or values or a model that know how many samples there are
    passes.room.note(
        f"block {piece.block.name} did not fit the device's memory with {size} samples in a forward pass: it was run with fewer"
    )
    halves = [{name: value[rows] for name, value in part.items()} for rows in (slice(size // 2), slice(size // 2, size))]
    first, second = (_made(piece, half, constants, passes, observe) for half in halves)
    return {name: torch.cat([made, second[name]]) for name, made in first.items()}


def unpacked(value: Value) -> torch.Tensor | Parts:
    """A value in floats."""
    return value.floats() if isinstance(value, Packed) else value
