"""A model imported to torch block by block, and the activations of a stream (float or quantized) that are moved through it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .fake_quant import fake_quantize
from .graph import last_reads
from .partition import Block
from .quant_table import QuantTable
from .source import SourceModel, ValueTypes
from .torch_import import TorchBlock, import_block

CHUNK = 64  # samples per forward pass

Observer = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TorchModel:
    """The pieces of a model (blocks or units) in execution order, imported to torch on one device."""

    source: SourceModel
    types: ValueTypes
    device: torch.device
    pieces: tuple[TorchBlock, ...]

    @classmethod
    def of(cls, source: SourceModel, types: ValueTypes, blocks: Sequence[Block], device: torch.device) -> "TorchModel":
        return cls(source, types, device, tuple(import_block(source, types, block).to(device) for block in blocks))

    def constants(self, piece: TorchBlock, table: QuantTable | None = None) -> dict[str, torch.Tensor]:
        """A piece's weights and biases: the float ones, or (with a table) what their codes stand for."""
        return {
            name: laid_out(
                torch.tensor(table[name].dequantized() if table is not None and name in table else self.source.constants[name])
            ).to(self.device)
            for name in piece.weights
        }

    def stream(self, inputs: Mapping[str, np.ndarray], table: QuantTable | None = None) -> "ActivationCache":
        """Start a stream at the graph inputs: the float one, or (with a table) the quantized one."""
        values = {name: laid_out(torch.from_numpy(np.ascontiguousarray(array)).to(self.device)) for name, array in inputs.items()}
        if table is not None:
            values = {name: quantizing(table)(name, tensor) for name, tensor in values.items()}
        return ActivationCache(values, last_reads([piece.block.nodes for piece in self.pieces], self.source.graph))

    def run(self, piece: TorchBlock, cache: "ActivationCache", table: QuantTable | None = None) -> dict[str, torch.Tensor]:
        """A piece's outputs over all samples, in float or (with a table) quantized."""
        return run_piece(
            piece, cache.of(piece.block.inputs), self.constants(piece, table), quantizing(table) if table is not None else None
        )


class ActivationCache:
    """The live values of a stream by ONNX name, each a tensor of all samples [N, ...].

    Each piece is run once, and what nothing later reads is freed.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], dead_after: Iterable[frozenset[str]]) -> None:
        self._values = dict(values)
        self._dead_after = iter(dead_after)

    def of(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self._values[name] for name in names}

    def advance(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Take in the outputs of the next piece and drop the values that nothing after it reads."""
        self._values.update(outputs)
        for name in next(self._dead_after):
            self._values.pop(name, None)


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """Images channels last: 2-4 times faster convolutions on CPUs, and what tensor cores want."""
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


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
    piece: TorchBlock, inputs: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], observe: Observer | None = None
) -> dict[str, torch.Tensor]:
    """Run a piece over all samples in chunks.

    Args:
        piece: the block or unit.
        inputs: its inputs [N, ...] by name.
        constants: its weights and biases by name, quantized already where they should be.
        observe: called on every value that the piece makes; what it returns takes the value's place.
    """
    count = len(next(iter(inputs.values())))
    outputs: dict[str, torch.Tensor] = {}
    for start in range(0, count, CHUNK):
        chunk = {name: tensor[start : start + CHUNK] for name, tensor in inputs.items()}
        for name, tensor in piece({**chunk, **constants}, observe).items():
            if name not in outputs:
                memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                size = (count, *tensor.shape[1:])
                outputs[name] = torch.empty(size, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
            outputs[name][start : start + CHUNK] = tensor
    return outputs
