"""How much memory a run takes, and where cached activations go that do not fit: into files that are mapped to memory."""

import math
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import DeviceMemoryError, StorageError, UsageError
from .graph import last_reads
from .packing import code_bytes
from .partition import Block
from .placement import Placement
from .source import SourceModel, ValueTypes

SUFFIX = ".cache"
CPU = torch.device("cpu")
_FLOAT = 4  # bytes
_LIBRARIES = 150 << 20  # what torch, oneDNN and ONNX Runtime take once they compute (measured: 120 to 180 MB)
# Floats of the largest value that are alive in a forward pass: what is read, made, quantized, and the binning of calibration.
_PASS_VALUES = 4
# Floats for each weight that is learned: the constant, its layouts, ten buffers of the rounding and the optimiser.
_WEIGHT_FLOATS = 13


@dataclass(frozen=True)
class Demand:
    """The estimate of a run's peak, in bytes: what is resident already, the cached activations, and the work beside them.

    `where` is the block whose work takes the most; `joined` is the work of the largest unit that blocks may be joined to, which is known
    once they are measured, and `least` the most that work takes where it is done in the smallest parts. `device` is None on the CPU; else
    it is what a device has for cached activations beside the work, which is done there: only the others are in the host's memory.
    """

    taken: int
    caches: int
    work: int
    where: str
    device: float | None = None
    joined: int = 0
    least: int = 0

    @property
    def total(self) -> int:
        """In the host's memory, blocks alone."""
        return self.taken + self._in_host(self.work) + self._kept

    @property
    def most(self) -> int:
        """In the host's memory, where blocks are joined to the largest units that they may be."""
        return self.taken + self._largest + self._kept

    def room_in(self, budget: int | None) -> float:
        """Bytes for cached activations in the host's memory under a budget, beside the work on the largest unit.

        Raises:
            UsageError: the budget does not even hold the rest, with mini-batches in the smallest parts.
        """
        if budget is None:
            return math.inf
        needed = self.taken + self._in_host(self.least)
        if budget < needed:
            work = f" and the work on a unit takes about {readable(self.least)} in the smallest parts" if self.device is None else ""
            raise UsageError(
                f"--memory-budget {readable(budget)}: {readable(self.taken)} are in use already (program, model, samples){work}, without "
                f"any cached activation; give {math.ceil(needed / 1e8) / 10:g} GB or more"
            )
        return max(budget - self.taken - self._largest, 0)

    def describe(self, budget: int | None) -> str:
        """The estimate in a line."""
        room, kept = self.room_in(budget), self._kept
        parts = f"{readable(self.taken)} in use, {readable(kept)} cached activations"
        if self.device is None:
            parts += f", {readable(self.work)} work on {self.where}"
        else:
            parts += f"; on the device {readable(self.caches - kept)} of them, {readable(self.work)} work on {self.where}"
        joined = f", up to {readable(self.most)} where blocks are joined" if self.most > self.total else ""
        if kept <= room and (budget is None or self.most <= budget):
            return f"memory: about {readable(self.total)} at the peak{joined} ({parts})"
        files = f"; about {readable(kept - int(room))} of them go to files" if kept > room else ""
        return f"memory: {readable(budget or 0)} ({parts}{joined}{files})"

    def _in_host(self, work: int) -> int:
        return work if self.device is None else 0

    @property
    def _largest(self) -> int:
        """The work on the largest unit, in the host's memory."""
        return self._in_host(max(self.work, self.joined))

    @property
    def _kept(self) -> int:
        """Cached activations in the host's memory, or in files."""
        return int(max(self.caches - (self.device or 0), 0))


@dataclass(frozen=True)
class Work:
    """What the work on units takes beside cached activations.

    Attributes:
        source: the model.
        types: shapes of one sample of each value.
        grids: the activations that are quantized.
        samples: calibration samples.
        batch: samples of a mini-batch, from the floats of the largest value of a unit for each.
        pass_size: samples in a forward pass.
        is_divisible: whether mini-batches are samples, which can be learned from in parts, and not whole forward passes.
    """

    source: SourceModel
    types: ValueTypes
    grids: AbstractSet[str]
    samples: int
    batch: Callable[[int], int]
    pass_size: int
    is_divisible: bool = True

    def on(self, block: Block, parts: int = 1) -> int:
        """Bytes of a unit's mini-batches, in parts one after the other, and of its forward passes, whichever is more."""
        made = {name: self._size(name) for node in block.nodes for name in node.outputs if name}
        largest = max([*made.values(), *(self._size(name) for name in block.inputs)], default=0)
        # Kept for backward: what every node made, and what was quantized of it; then the gradients at the largest, and inputs and targets.
        kept = sum(made.values()) + sum(size for name, size in made.items() if name in self.grids)
        fed = 2 * sum(self._size(name) for name in (*block.inputs, *block.outputs))
        weights = [w for node in block.nodes if (w := self.source.graph.weight(node)) is not None]
        learned = _WEIGHT_FLOATS * sum(self.source.constants[weight].nbytes for weight in weights)
        together = -(-self._batch(block) // (parts if self.is_divisible else 1))
        return max(together * (kept + 2 * largest + fed) + learned, min(self.pass_size, self.samples) * _PASS_VALUES * largest)

    def parts_within(self, block: Block, room: float) -> int:
        """Parts of a unit's mini-batches that some bytes hold: halves of halves, and single samples where none are small enough."""
        parts, batch = 1, self._batch(block) if self.is_divisible else 1
        while parts < batch and self.on(block, parts) > room:
            parts = min(2 * parts, batch)
        return parts

    def _batch(self, block: Block) -> int:
        return min(self.batch(self.types.largest(block.values)), self.samples)

    def _size(self, name: str) -> int:
        return _FLOAT * math.prod(self.types.shapes[name]) if name in self.types.shapes else 0


def demand(
    work: Work,
    blocks: Sequence[Block],
    placement: Placement,
    float_bytes: int = _FLOAT,
    device: torch.device = CPU,
    units: Sequence[Block] = (),
) -> Demand:
    """Estimate the memory of a reconstruction.

    Args:
        work: the model, the samples, and what the work on blocks takes.
        blocks: the units, or the blocks they will be made of.
        placement: the grids of activations.
        float_bytes: of an element in a cached activation that is on no grid.
        device: where it is done.
        units: what blocks may be joined to.
    """
    source, types, samples = work.source, work.types, work.samples
    alive, caches = set(source.graph.inputs), 0
    for block, dead in zip(blocks, last_reads([block.nodes for block in blocks], source.graph), strict=True):
        alive |= set(block.outputs)
        elements = {name: math.prod(types.shapes[name]) for name in alive if name in types.stacked and name in types.shapes}
        caches = max(
            caches, samples * sum(count * (float_bytes + _code_bytes(placement, name, float_bytes)) for name, count in elements.items())
        )
        alive -= dead
    largest = max(blocks, key=work.on)
    least = max(work.on(block, parts=samples) for block in (*blocks, *units))
    inputs = sum(math.prod(types.shapes[name]) for name in source.graph.inputs if name in types.shapes)
    chosen = samples * inputs * _FLOAT  # the samples that were drawn, beside those that were read
    weights = sum(array.nbytes for array in source.constants.values())
    # As arrays and as codes; where the weights are outside, only their codes are held, in the table and in the file that is made of it.
    held = 2 * weights if source.shelf is None else weights // 2
    taken, most = resident() + chosen + _LIBRARIES + held, work.on(largest)
    joined = max(map(work.on, units), default=0)
    return Demand(taken, caches, most, largest.name, _device_room(device, most), joined, least)


def _code_bytes(placement: Placement, name: str, otherwise: int) -> int:
    """Bytes of an element in the quantized stream."""
    spec = placement.activations.get(placement.tied.get(name, name))
    size = code_bytes(spec.bits) if spec is not None and not spec.float8 else None
    return otherwise if size is None else size


class Room:
    """Where whole values are kept: on the device up to a limit, then in the host's memory up to another, then in files.

    Files vanish with their last reader. `used`, `filed` and `on_device` are the bytes in memory, files and on a device that is no CPU;
    `notes` says what went otherwise than planned.
    """

    def __init__(self, limit: float = math.inf, folder: Path | None = None, device_limit: float = math.inf) -> None:
        self._limit, self._folder, self._device_limit = limit, folder, device_limit
        self.used = self.filed = self.on_device = 0
        self.notes: list[str] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor to be filled, on the device or, where that is full, on the CPU; 4-d ones are laid out channels last.

        Raises:
            StorageError: there is no room on the disk.
        """
        size = math.prod(shape) * dtype.itemsize
        order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
        flat, place = self._on_device(size, dtype, device) if device.type != "cpu" else None, "on_device"
        if flat is None and (size == 0 or self.used + size <= self._limit):
            flat, place = self._in_host(size // dtype.itemsize, dtype, device), "used"
        if flat is None:
            flat, place = self._mapped(size, dtype), "filed"
        tensor = flat.view([shape[axis] for axis in order])
        tensor = tensor.permute(0, 3, 1, 2) if len(shape) == 4 else tensor
        self._count(place, size)
        weakref.finalize(tensor, self._count, place, -size)
        return tensor

    def note(self, text: str) -> None:
        """Remember what went otherwise than planned, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _on_device(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        if self.on_device + size > self._device_limit:
            return None
        try:
            return torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            self._device_limit = self.on_device
            self.note(f"the device's memory was full at {readable(self.on_device)} of cached activations: the others are in the host's")
            return None

    def _in_host(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            try:
                return torch.empty(count, dtype=dtype, pin_memory=True)  # copied to the device while that computes
            except RuntimeError:  # the system does not let so much be pinned
                self.note("cached activations in the host's memory could not be pinned, which makes copies to the device slower")
        return torch.empty(count, dtype=dtype)

    def _count(self, place: str, size: int) -> None:
        if place == "on_device":
            self.on_device += size
        elif place == "used":
            self.used += size
        else:
            self.filed += size

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


@contextmanager
def enough(what: str) -> Iterator[None]:
    """Make an error of the project of a device whose memory does not hold what cannot be done in smaller parts."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        detail = str(error).partition("\n")[0]
        raise DeviceMemoryError(
            f"{what}: the device's memory does not hold it, in the smallest parts either ({detail}); use --device cpu"
        ) from error


def _device_room(device: torch.device, work: int) -> float | None:
    """Bytes for cached activations on a device beside the work; a tenth of what is free is left to the libraries."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(0.9 * free - work, 0.0)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def readable(size: float) -> str:
    """Bytes in decimal units."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
