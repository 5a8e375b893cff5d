"""How much memory a run takes, and where cached activations go that do not fit: into files that are mapped to memory."""

import math
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import StorageError, UsageError
from .graph import last_reads
from .packing import code_bytes
from .partition import Block
from .placement import Placement
from .source import SourceModel, ValueTypes

SUFFIX = ".cache"
_FLOAT = 4  # bytes
_LIBRARIES = 150 << 20  # what torch, oneDNN and ONNX Runtime take once they compute (measured: 120 to 180 MB)
# Floats of the largest value that are alive in a forward pass: what is read, made, quantized, and the binning of calibration.
_PASS_VALUES = 4
# Floats for each weight that is learned: the constant, its layouts, nine buffers of the rounding and the optimiser.
_WEIGHT_FLOATS = 12


@dataclass(frozen=True)
class Demand:
    """The estimate of a run's peak, in bytes: what is resident already, the cached activations, and the work beside them.

    `where` is the block whose work takes the most.
    """

    taken: int
    caches: int
    work: int
    where: str

    @property
    def total(self) -> int:
        return self.taken + self.caches + self.work

    def room_in(self, budget: int | None) -> float:
        """Bytes for cached activations under a budget.

        Raises:
            UsageError: the budget does not even hold the rest.
        """
        if budget is None:
            return math.inf
        if budget < self.taken + self.work:
            raise UsageError(
                f"--memory-budget {readable(budget)}: {readable(self.taken)} are in use already (program, model, samples) and the work on "
                f"block {self.where} takes about {readable(self.work)}, without any cached activation; give "
                f"{readable(self.taken + self.work)} or more, or lower --batch-size"
            )
        return budget - self.taken - self.work

    def describe(self, budget: int | None) -> str:
        """The estimate in a line."""
        room = self.room_in(budget)
        parts = f"{readable(self.taken)} in use, {readable(self.caches)} cached activations, {readable(self.work)} work on {self.where}"
        if self.caches <= room:
            return f"memory: about {readable(self.total)} at the peak ({parts})"
        return f"memory: {readable(budget or 0)} ({parts}; about {readable(self.caches - int(room))} of them go to files)"


def demand(
    source: SourceModel,
    types: ValueTypes,
    blocks: Sequence[Block],
    placement: Placement,
    samples: int,
    batch: int,
    pass_size: int,
    float_bytes: int = _FLOAT,
) -> Demand:
    """Estimate the memory of a reconstruction.

    Args:
        source: the model.
        types: shapes of one sample of each value.
        blocks: the units, or the blocks they will be made of.
        placement: the grids of activations.
        samples: calibration samples.
        batch: samples of a mini-batch.
        pass_size: samples in a forward pass.
        float_bytes: of an element in a cached activation that is on no grid.
    """
    sizes = {name: _FLOAT * math.prod(shape) for name, shape in types.shapes.items()}
    inputs = sum(sizes.get(name, 0) for name in source.graph.inputs)
    alive, caches, work, where = set(source.graph.inputs), 0, 0, blocks[0].name
    for block, dead in zip(blocks, last_reads([block.nodes for block in blocks], source.graph), strict=True):
        alive |= set(block.outputs)
        elements = {name: sizes.get(name, 0) // _FLOAT for name in alive if name in types.stacked}
        caches = max(
            caches, samples * sum(count * (float_bytes + _code_bytes(placement, name, float_bytes)) for name, count in elements.items())
        )
        alive -= dead
        found = _work(source, block, sizes, placement.activations.keys(), min(batch, samples), min(pass_size, samples))
        if found > work:
            work, where = found, block.name
    chosen = samples * inputs  # the samples that were drawn, beside those that were read
    weights = sum(array.nbytes for array in source.constants.values())
    # As arrays and as codes; where the weights are outside, only their codes are held, in the table and in the file that is made of it.
    held = 2 * weights if source.shelf is None else weights // 2
    return Demand(resident() + chosen + _LIBRARIES + held, caches, work, where)


def _code_bytes(placement: Placement, name: str, otherwise: int) -> int:
    """Bytes of an element in the quantized stream."""
    spec = placement.activations.get(placement.tied.get(name, name))
    size = code_bytes(spec.bits) if spec is not None and not spec.float8 else None
    return otherwise if size is None else size


def _work(source: SourceModel, block: Block, sizes: Mapping[str, int], grids: AbstractSet[str], batch: int, pass_size: int) -> int:
    """Bytes of a block's mini-batches and of its forward passes, whichever is more."""
    made = {name: sizes.get(name, 0) for node in block.nodes for name in node.outputs if name}
    largest = max([*made.values(), *(sizes.get(name, 0) for name in block.inputs)], default=0)
    # Kept for backward: what every node made, and what was quantized of it; then the gradients at the largest, and inputs and targets.
    kept = sum(made.values()) + sum(size for name, size in made.items() if name in grids)
    fed = 2 * sum(sizes.get(name, 0) for name in (*block.inputs, *block.outputs))
    weights = sum(source.constants[w].nbytes for node in block.nodes if (w := source.graph.weight(node)) is not None)
    return max(batch * (kept + 2 * largest + fed) + _WEIGHT_FLOATS * weights, pass_size * _PASS_VALUES * largest)


class Room:
    """Where whole values are kept: in memory up to a limit, then in files that vanish with their last reader."""

    def __init__(self, limit: float = math.inf, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self.used = 0
        self.filed = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor to be filled; 4-d ones are laid out channels last.

        Raises:
            StorageError: there is no room on the disk.
        """
        size = math.prod(shape) * dtype.itemsize
        order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
        in_file = device.type == "cpu" and size > 0 and self.used + size > self._limit
        if in_file:
            flat = self._mapped(size, dtype)
            self.filed += size
        else:
            flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
            self.used += size
        tensor = flat.view([shape[axis] for axis in order])
        tensor = tensor.permute(0, 3, 1, 2) if len(shape) == 4 else tensor
        weakref.finalize(tensor, self._release, 0 if in_file else size, size if in_file else 0)
        return tensor

    def _release(self, used: int, filed: int) -> None:
        self.used -= used
        self.filed -= filed

    def _mapped(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        place = ""
        try:
            descriptor, place = tempfile.mkstemp(SUFFIX, dir=self._folder)
            try:
                # Blocks that are only promised would kill the process where it writes to a full disk.
                os.posix_fallocate(descriptor, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(descriptor, size)
            finally:
                os.close(descriptor)
            return torch.from_file(place, shared=True, size=size // dtype.itemsize, dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"{self._folder or tempfile.gettempdir()}: no room for {readable(size)} of cached activations: {error}. What was finished "
                "is kept: make room or raise --memory-budget, then --resume continues"
            ) from error
        finally:
            if place and os.name == "posix":  # the file lives as long as its mapping, whatever happens to this process
                Path(place).unlink(missing_ok=True)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def readable(size: float) -> str:
    """Bytes in decimal units."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
