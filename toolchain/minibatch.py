"""Mini-batches of a unit's cached inputs and targets, mixed from both streams as QDrop does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .activations import Parts, Passes, Value
from .fake_quant import Coins, Tiles, dense
from .losses import output_shares
from .packing import Packed
from .processes import ALONE, Processes


class Draw:
    """Mini-batches of a unit's inputs and targets: samples at random where all of them are arrays of samples.

    Otherwise whole forward passes at random, as many as it takes (the fixed batches of the MRECG release): a value that knows the number of
    samples in a pass, such as a shape, fits no other selection. Of rows, each process takes its share; whole passes each process takes all.
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
    ) -> None:
        self._inputs, self._floats, self._passes = inputs, float_inputs, passes
        self.shares = output_shares(targets, passes)
        self._targets = {name: targets[name] for name in self.shares}
        self._batch_size = batch_size
        self._by_pass = any(isinstance(value, Parts) for value in (*inputs.values(), *self._targets.values()))
        self.generator, self.device = generator, generator.device
        self.processes = ALONE if self._by_pass else processes  # those that have a share each

    def selections(self) -> Sequence[torch.Tensor | int]:
        """Rows, or the numbers of forward passes, of the next mini-batch."""
        if not self._by_pass:
            rows = torch.randperm(self._passes.count, generator=self.generator, device=self.device)[: self._batch_size]
            return [rows[self.processes.share(len(rows))]]
        count, wanted = len(list(self._passes)), max(round(self._batch_size / self._passes.size), 1)
        return torch.randperm(count, generator=self.generator, device=self.device)[:wanted].tolist()

    def batch(self, selection: torch.Tensor | int, coins: Coins | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Inputs, mixed from both streams where there are coins, and targets."""
        fed = {name: self._picked(value, selection) for name, value in self._inputs.items()}
        if coins is not None:
            for name, value in fed.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    fed[name] = _mixed(value, self._picked(self._floats[name], selection), coins)
        return fed, {name: self._picked(target, selection) for name, target in self._targets.items()}

    def _picked(self, value: Value, selection: torch.Tensor | int) -> Any:
        if isinstance(selection, int):
            part = self._passes.part(value, selection)
            return part.clone() if isinstance(part, torch.Tensor) else part
        assert not isinstance(value, Parts)
        return value.packing.unpack(_rows(value.kept, selection)) if isinstance(value, Packed) else _rows(value, selection)


def _rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A mini-batch of a cached value, in its layout: whole samples are contiguous in memory, so that this is a copy of rows."""
    order = (0, 2, 3, 1) if tensor.dim() == 4 else tuple(range(tensor.dim()))
    picked = torch.index_select(tensor.permute(order).reshape(len(tensor), -1), 0, rows)
    shape = [tensor.shape[axis] for axis in order[1:]]
    picked = picked.view(len(rows), *shape)
    return picked.permute(0, 3, 1, 2) if tensor.dim() == 4 else picked


def _mixed(quantized: torch.Tensor, floats: torch.Tensor, coins: Coins) -> torch.Tensor:
    """Each element from the quantized stream at heads, else from the float stream (QDrop); may overwrite `quantized`."""
    quantized = dense(quantized)
    if floats.stride() != quantized.stride():
        floats = torch.empty_like(quantized).copy_(floats)
    tiles = Tiles(quantized)
    keep, coins = tiles.buffer(), coins.over(quantized)
    for ours, theirs in tiles.of(quantized, floats):
        torch.lerp(theirs, ours, coins.toss(keep[: len(ours)]), out=ours)
    return quantized
