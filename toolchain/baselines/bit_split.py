"""Bit-Split and stitching: the codes of a layer's weights are found one bit at a time against the layer's output.

Wang, Chen, He, Cheng, "Towards accurate post-training network quantization via bit-split and stitching" (ICML 2020).

Implemented: a signed code of M bits is a sum of M-1 ternary digits, q = sum_m 2^m t_m with t_m in {-1, 0, 1}. Minimising
||Y - X (s * q)||^2 over scale and codes goes in turns (section 3): the scale of each output channel in closed form; each digit of each
weight, most significant first, exactly, all others held. No turn raises the error. It starts in weight space (X the identity), as the
authors' code does. X are the layer's inputs in the quantized stream with activations on their grids, Y the float outputs: codes and scales
make up for the rounding of activations too (error compensation, section 3.3). The means of the outputs, which the authors re-estimate in
BatchNorm, go into int32 biases in closed form.

The error is a quadratic form: all that is kept of the samples are X'X and X'Y of each group, gathered once.

Not implemented: activation scales found on the partly quantized network; they are those of the calibration. Grids must be symmetric.
Weights with one scale for the tensor, stacks of matrices and grouped transposed convolutions keep their calibrated codes, which the unit's
result says.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..activations import Value, laid_out, quantizing, unpacked
from ..calibration import rows_of
from ..quant_table import QuantSpec, QuantTable
from ..unit import Learned, Unit, UnitResult, learned_unit
from .layer import Layer

_EPOCHS = 100  # the authors' bound; it converges in a tenth of that
_ROWS = 32768  # output positions that are enough, the authors take 12000 ...
_SAMPLES = 128  # ... if they are from at least so many samples
_MOST_MOMENTS = 1 << 27  # numbers in X'X of all groups: 1 GB
_SMALLEST = 0.25  # of the calibrated scale: the int32 codes of biases have room for no more


@dataclass(frozen=True)
class Moments:
    """The squared error of a linear map as a quadratic form of its weights w [G, K, O], groups by inputs by outputs.

    sum (y - x w)^2 = energy - 2 <w, cross> + <w, gram w>. `gram` is X'X [G, K, K], `cross` X'Y [G, K, O], `energy` of Y [G, O].
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def of_weights(cls, weights: torch.Tensor) -> "Moments":
        """Those of the distance to float weights [G, K, O]: X is the identity."""
        eye = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
        return cls(eye.expand(len(weights), -1, -1), weights, weights.square().sum(1))

    def error(self, weights: torch.Tensor) -> float:
        """The squared error of weights [G, K, O]."""
        return float((self.energy + (weights * (self.gram @ weights - 2 * self.cross)).sum(1)).sum())


def alternate(
    moments: Moments, codes: torch.Tensor, scale: torch.Tensor, bits: int, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that no single digit, and no scale, can improve.

    Args:
        moments: the error.
        codes: to start with [G, K, O], within -(2^(bits-1) - 1) .. 2^(bits-1) - 1.
        scale: to start with [G, O].
        bits: of the codes.
        least: smallest scales allowed [G, O].
    """
    digits = _digits(codes, bits - 1)
    places = [2.0**m for m in range(bits - 1)]
    diagonal = moments.gram.diagonal(dim1=1, dim2=2)  # [G, K]
    for _ in range(_EPOCHS):
        scale = _best_scale(moments, codes, scale, least)
        before = codes
        for place, digit in sorted(zip(places, digits, strict=True), key=lambda pair: -pair[0]):
            step = scale * place
            wanted = moments.cross - moments.gram @ ((codes - place * digit) * scale.unsqueeze(1))
            others = codes - place * digit
            for k in range(codes.shape[1]):
                rest = (moments.gram[:, k : k + 1] @ digit).squeeze(1) - diagonal[:, k : k + 1] * digit[:, k]
                pull = wanted[:, k] - step * rest  # [G, O]; the error falls by 2 t step pull - t^2 step^2 gram_kk
                digit[:, k] = pull.sign() * (pull.abs() > 0.5 * step * diagonal[:, k : k + 1])
            codes = others + place * digit
        if torch.equal(codes, before):
            break
    return codes, _best_scale(moments, codes, scale, least)


def _best_scale(moments: Moments, codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """<q, X'Y> / <q, X'X q> for each output [G, O]; as it was where all codes are zero."""
    power = (codes * (moments.gram @ codes)).sum(1)
    best = (codes * moments.cross).sum(1) / power.clamp_min(torch.finfo(power.dtype).tiny)
    return torch.where(power > 0, torch.maximum(best, least), scale)


def _digits(codes: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The ternary digits of codes, least significant first."""
    size = codes.abs().long()
    return [((size >> m) & 1).to(codes.dtype) * codes.sign() for m in range(count)]


def split_unit(unit: Unit) -> tuple[UnitResult, dict[str, Value]]:
    """Find the codes of a layer by bit splitting."""
    layer = Layer.of(unit)

    def learn(start: QuantTable) -> Learned:
        unit.progress(0, 1, math.nan)
        moments = _moments(layer, start)
        if isinstance(moments, str):
            return Learned(start, (), None, f"not split: {moments}")
        return Learned(_split(layer, start, moments), (), None)

    return learned_unit(layer.unit, learn)


@torch.no_grad()
def _split(layer: Layer, table: QuantTable, moments: Moments) -> QuantTable:
    grid = table[layer.weight]
    spec, float_weight = grid.spec, layer.floats[layer.weight]
    groups = len(moments.gram)
    weights = _grouped(rows_of(float_weight, spec), groups, layer.unit.device)
    assert grid.codes is not None
    codes = _grouped(rows_of(grid.codes, spec), groups, layer.unit.device).clamp(-spec.qmax, spec.qmax)  # no digits sum to -2^(M-1)
    scale = torch.tensor(np.asarray(grid.scale, np.float64)).to(layer.unit.device).reshape(groups, -1)
    least = _SMALLEST * scale
    codes, scale = alternate(Moments.of_weights(weights), codes, scale, spec.bits, least)
    codes, scale = alternate(moments, codes, scale, spec.bits, least)
    shape = np.moveaxis(float_weight, spec.axis or 0, 0).shape
    found = codes.transpose(1, 2).reshape(shape).cpu().numpy().astype(np.int32)
    learned = replace(
        grid,
        scale=scale.reshape(-1).cpu().numpy().astype(np.float32),
        codes=np.ascontiguousarray(np.moveaxis(found, 0, spec.axis or 0)),
    )
    return with_means(layer, layer.unit.finish(table.updated({layer.weight: learned})))


def with_means(layer: Layer, table: QuantTable) -> QuantTable:
    """The table with an int32 bias that gives the layer's output the mean of its target in each channel, as far as that lowers the loss."""
    if layer.bias is None or layer.bias not in table:
        return table
    grid = table[layer.bias]
    loss, outputs = layer.unit.outcome(table)
    made, target = unpacked(outputs[layer.output]), unpacked(layer.target)
    assert grid.codes is not None
    if not isinstance(made, torch.Tensor) or not isinstance(target, torch.Tensor):
        return table
    axis = 1 if layer.node.op_type in ("Conv", "ConvTranspose") else made.dim() - 1
    missing = (target - made).mean(dim=[a for a in range(made.dim()) if a != axis]).cpu().numpy()
    codes = grid.codes + np.rint(missing / np.asarray(grid.scale)).astype(np.int32).reshape(grid.codes.shape)
    moved = table.updated({layer.bias: replace(grid, codes=codes)})
    return moved if layer.unit.outcome(moved)[0] < loss else table


def _grouped(rows: np.ndarray, groups: int, device: torch.device) -> torch.Tensor:
    """Rows [O, K] as weights [G, K, O/G] in double precision."""
    return torch.tensor(rows.reshape(groups, -1, rows.shape[1]), dtype=torch.float64).to(device).transpose(1, 2).contiguous()


@torch.no_grad()
def _moments(layer: Layer, table: QuantTable) -> Moments | str:
    """X'X and X'Y of a layer; in words, why there are none for weights that are not one matrix and one scale for each output of a group."""
    weight, spec = layer.floats[layer.weight], table[layer.weight].spec
    if spec.axis is None:
        return "its weight has one scale for the whole tensor"
    if spec.block is not None:
        return "its weight has a scale for each block of inputs"
    if not spec.symmetric or weight.size == 0:
        return "its weight is empty" if spec.symmetric else "its grid is not symmetric"
    is_conv = layer.node.op_type in ("Conv", "ConvTranspose")
    if not is_conv and weight.ndim != 2:
        return "its weight is a stack of matrices"
    if any(name and name not in layer.floats for name in layer.node.inputs[2:]):
        return "its bias is computed by the model"
    read = layer.node.inputs[0]
    found: dict[str, torch.Tensor] = {}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == layer.output:
            return tensor
        tensor = quantizing(table)(name, tensor)
        found[name] = tensor
        return tensor

    constants = layer.constants()
    silent = constants | {layer.weight: torch.zeros_like(constants[layer.weight])}
    first = {name: layer.unit.passes.part(value, 0) for name, value in layer.unit.inputs.items()}
    offset = layer.unit.piece(first | silent, observe)[layer.output][:1]  # what the bias adds, wherever it is added
    channels = found.get(read, first.get(read))
    assert channels is not None
    rows = rows_of(weight, spec)
    groups = channels.shape[1] // weight.shape[1] if layer.node.op_type == "Conv" else 1
    inner = rows.shape[1]
    if offset.shape[1 if is_conv else -1] != len(rows):
        return "a grouped transposed convolution"
    if groups * inner * inner > _MOST_MOMENTS:
        return f"the moments of its {groups * inner:,} inputs would take {8 * groups * inner * inner / 1e9:.1f} GB"
    silent[layer.weight] = laid_out(_unfolding(weight.shape, spec, groups)).to(layer.unit.device)
    if layer.bias is not None:
        silent[layer.bias] = torch.zeros(groups * inner, device=layer.unit.device)
    gram = torch.zeros(groups, inner, inner, dtype=torch.float64, device=layer.unit.device)
    cross = torch.zeros(groups, inner, len(rows) // groups, dtype=torch.float64, device=layer.unit.device)
    energy = torch.zeros(groups, len(rows) // groups, dtype=torch.float64, device=layer.unit.device)
    seen = 0
    for index, part in enumerate(layer.unit.passes):
        fed = {name: layer.unit.passes.part(value, index) for name, value in layer.unit.inputs.items()}
        target = layer.unit.passes.part(layer.target, index) - offset
        x, y = (
            (tensor.movedim(1, -1) if is_conv else tensor).reshape(-1, groups, size).transpose(0, 1)
            for tensor, size in ((layer.unit.piece(fed | silent, observe)[layer.output], inner), (target, len(rows) // groups))
        )  # [G, rows, K], [G, rows, O]
        gram += (x.transpose(1, 2) @ x).double()
        cross += (x.transpose(1, 2) @ y).double()
        energy += y.double().square().sum(1)
        seen += x.shape[1]
        if seen >= _ROWS and part.stop >= _SAMPLES:
            break
    return Moments(gram, cross, energy)


def _unfolding(shape: tuple[int, ...], spec: QuantSpec, groups: int) -> torch.Tensor:
    """The weight under which a layer gives back, for each output position, all K numbers that its weights are multiplied with there."""
    axis = spec.axis or 0
    others = [size for a, size in enumerate(shape) if a != axis]
    inner = math.prod(others)
    return torch.eye(inner).reshape(inner, *others).repeat(groups, *[1] * len(others)).movedim(0, axis)
