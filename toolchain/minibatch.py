"""Mini-batches of a unit's cached inputs and targets, mixed from both streams as QDrop does."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .activations import Parts, Passes, Value
from .fake_quant import Coins, Tiles, dense
from .losses import output_shares
from .packing import Packed
from .processes import ALONE, Processes

Selection = torch.Tensor | int
"""Numbers of samples [n], or of a forward pass."""


class Batch(NamedTuple):
    """A mini-batch as it is cached: inputs in the quantized stream, the floats among them in the float stream, and targets."""

    inputs: dict[str, Any]
    floats: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]

    def filled(self, other: "Batch") -> "Batch":
        """The same tensors, with the elements of another mini-batch of as many samples."""
        for own, theirs in zip(self, other, strict=True):
            for name, tensor in own.items():
                tensor.copy_(theirs[name], non_blocking=True)
        return self


class Draw:
    """Mini-batches of a unit's inputs and targets: samples at random where all of them are arrays of samples.

    Otherwise whole forward passes at random, as many as it takes (the fixed batches of the MRECG release): a value that knows the number of
    samples in a pass, such as a shape, fits no other selection, and neither does a model of a fixed batch. Of rows, each process takes its
    share, in parts where there are `splits`; whole passes each process takes all.
    """

    def __init__(
        self,
        inputs: Mapping[str, Value],
        float_inputs: Mapping[str, Value],
        targets: Mapping[str, Value],
        passes: Passes,
        batch_size: int,
        generator: torch.Generator,
        processes: Processes = ALONE,
        splits: int = 1,
    ) -> None:
        self._inputs, self._floats, self._passes = inputs, float_inputs, passes
        self.shares = output_shares(targets, passes)
        self._targets = {name: targets[name] for name in self.shares}
        self._batch_size = batch_size
        self._by_pass = passes.is_fixed or any(isinstance(value, Parts) for value in (*inputs.values(), *self._targets.values()))
        self._splits = splits
        self.generator, self.device = generator, generator.device
        # Drawn on the host, so that values that are kept there are gathered while the device computes.
        self._order = generator if self.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
        self.processes = ALONE if self._by_pass else processes  # those that have a share each

    @cached_property
    def _selected(self) -> frozenset[str]:
        """The inputs whose streams are mixed by selection; asked for where there are any mixed."""
        streams = (self._inputs, self._floats)
        return frozenset(n for n in self._inputs if any(_is_selected(stream[n], self._passes, self.device) for stream in streams))

    @property
    def is_steady(self) -> bool:
        """Whether a mini-batch is one selection of so many samples, the same number at each step."""
        return not self._by_pass and self._splits == 1

    def selections(self) -> list[Selection]:
        """Rows, or the numbers of forward passes, of the next mini-batch."""
        if not self._by_pass:
            rows = torch.randperm(self._passes.count, generator=self._order)[: self._batch_size]
            return list(rows[self.processes.share(len(rows))].chunk(self._splits))
        count, wanted = len(list(self._passes)), max(round(self._batch_size / self._passes.size), 1)
        return torch.randperm(count, generator=self._order)[:wanted].tolist()

    def parts(self, selection: Selection, selections: Sequence[Selection]) -> float:
        """How many of a selection make up the mini-batch of all processes: what the mean over the selection is divided by."""
        if isinstance(selection, int):
            return len(selections)
        return self.processes.count * sum(map(len, selections)) / len(selection)  # pyright: ignore[reportArgumentType]

    def gathered(self, selection: Selection, is_mixed: bool) -> Batch:
        """Inputs of the quantized stream and targets; those of the float stream too where they will be mixed."""
        inputs = {name: self._picked(value, selection) for name, value in self._inputs.items()}
        floating = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        floats = {name: self._picked(self._floats[name], selection) for name in floating} if is_mixed else {}
        return Batch(inputs, floats, {name: self._picked(target, selection) for name, target in self._targets.items()})

    def mixed(self, batch: Batch, coins: Coins | None) -> dict[str, Any]:
        """Inputs, mixed from both streams where there are coins; may overwrite those of the batch."""
        if coins is None:
            return dict(batch.inputs)
        mixed = {name: _mixed(batch.inputs[name], floats, coins, name in self._selected) for name, floats in batch.floats.items()}
        return batch.inputs | mixed

    def batch(self, selection: Selection, coins: Coins | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Inputs, mixed from both streams where there are coins, and targets."""
        batch = self.gathered(selection, coins is not None)
        return self.mixed(batch, coins), batch.targets

    def _picked(self, value: Value, selection: Selection) -> Any:
        if isinstance(selection, int):
            part = self._passes.part(value, selection)
            return part.clone() if isinstance(part, torch.Tensor) else part
        assert not isinstance(value, Parts)
        kept = _rows(value.kept if isinstance(value, Packed) else value, selection, self.device).to(self.device, non_blocking=True)
        return value.packing.unpack(kept) if isinstance(value, Packed) else kept


def _rows(tensor: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A mini-batch of a cached value, in its layout: whole samples are contiguous in memory, so that this is a copy of rows.

    On the host it is made in pinned memory where it goes to a device, which then computes while it is copied.
    """
    order = (0, 2, 3, 1) if tensor.dim() == 4 else tuple(range(tensor.dim()))
    flat = tensor.permute(order).reshape(len(tensor), -1)
    if tensor.device.type == "cpu" and device.type == "cuda":
        picked = torch.empty((len(rows), flat.shape[1]), dtype=tensor.dtype, pin_memory=True)
        torch.index_select(flat, 0, rows, out=picked)
    else:
        picked = torch.index_select(flat, 0, rows.to(tensor.device, non_blocking=True))
    shape = [tensor.shape[axis] for axis in order[1:]]
    picked = picked.view(len(rows), *shape)
    return picked.permute(0, 3, 1, 2) if tensor.dim() == 4 else picked


def _is_selected(value: Value, passes: Passes, device: torch.device) -> bool:
    """Whether streams are mixed by selection. Interpolation is faster on a CPU, but makes NaN of infinities, as masks of scores have.

    On other devices nothing is asked of the numbers, which would wait for them.
    """
    if isinstance(value, Packed):
        if value.packing.scale is not None:  # on a grid
            return device.type != "cpu"
        value = value.kept
    parts = value if isinstance(value, Parts) else (value[rows] for rows in passes)
    tensors = (part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point())
    return any({device.type, part.device.type} != {"cpu"} or not torch.isfinite(part.sum()) for part in tensors)


def _mixed(quantized: torch.Tensor, floats: torch.Tensor, coins: Coins, is_selected: bool) -> torch.Tensor:
    """Each element from the quantized stream at heads, else from the float stream (QDrop); may overwrite `quantized`."""
    quantized = dense(quantized)
    if floats.stride() != quantized.stride():
        floats = torch.empty_like(quantized).copy_(floats)
    tiles = Tiles(quantized)
    keep, coins = tiles.buffer().to(quantized.dtype), coins.over(quantized)
    for ours, theirs in tiles.of(quantized, floats):
        tossed = coins.toss(keep[: len(ours)])
        if is_selected:
            torch.where(tossed > 0, ours, theirs, out=ours)
        else:
            torch.lerp(theirs, ours, tossed, out=ours)
    return quantized
