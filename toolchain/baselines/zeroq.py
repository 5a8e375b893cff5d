"""ZeroQ: calibration samples made from the statistics that BatchNorm keeps, where there is no data.

Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: a novel zero shot quantization framework" (CVPR 2020), section 3.1.

Implemented: from normal noise, Adam moves the *samples* until the mean and deviation of what each BatchNorm reads are those of its training
data, sum_i |mean_i - mu_i|^2 + |deviation_i - sigma_i|^2. The statistics come from the file: in the normalised model BatchNorm is part of
the convolution before it, but the value that it made is still there. It is (x - mu) * gamma / sigma + beta, so that what BatchNorm read
follows from it.

What differs from the authors' code: statistics are over a batch, as BatchNorm's are, not of each sample. Their term for inputs of mean 0
and deviation 1 is left out, since inputs need not be normalised. Not implemented: the choice of bits by sensitivity.

What it costs: such samples have the moments of real ones and little else. The sample model at W4A4 (`mse`) had 0.6 dB more noise with 32 of
them than with 32 real samples, and 2 dB less than with plain noise; whoever has a few dozen unlabelled samples should use them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import inliner, numpy_helper

from ..activations import TorchModel, laid_out
from ..config import Config
from ..device import pick_device
from ..errors import DataError
from ..importing import cut_blocks
from ..islands import find_islands
from ..progress import Progress
from ..samples import Samples
from ..source import InputSpec, SourceModel, infer_types

BATCH = 32  # samples whose statistics are taken together
_STEPS = 500
_RATE, _LOWEST_RATE, _PATIENCE = 0.5, 1e-3, 30  # a plateau of so many steps lowers the rate tenfold
_SILENT = 1e-6  # gamma over the largest below which a channel says nothing of what BatchNorm read
_EPSILON = 1e-6


@dataclass(frozen=True)
class NormStatistics:
    """What a BatchNorm node says of its input, by channel [C], and the affine map that it applies.

    `value` is the node's output; it is (x - mean) * gain + offset, with gain = gamma / deviation.
    """

    value: str
    mean: np.ndarray
    deviation: np.ndarray
    gain: np.ndarray
    offset: np.ndarray


def norm_statistics(path: Path) -> tuple[NormStatistics, ...]:
    """The statistics of all BatchNorm nodes of a file, in its order, with parameters from initializers or Constant nodes."""
    model = onnx.load(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"}
    names = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    found = []
    for node in graph.node:
        parameters = [names.get(name, name) for name in node.input[1:5]]
        if node.op_type != "BatchNormalization" or any(name not in tensors for name in parameters):
            continue
        gamma, beta, mean, variance = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in parameters)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        deviation = np.sqrt(np.maximum(variance, 0.0) + epsilon)
        found.append(NormStatistics(node.output[0], mean, deviation, gamma / deviation, beta))
    return tuple(found)


def synthetic_samples(
    source: SourceModel,
    count: int,
    seed: int,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> Samples:
    """Distil samples for a model from the BatchNorm statistics in its file.

    Args:
        source: the normalised model.
        count: how many.
        seed: of the noise that they start from.
        size: height and width where the model leaves them open.
        device: where.
        progress: called with (what, steps done, steps in all, loss).

    Raises:
        DataError: the model has no statistics left, or an input that cannot be made.
    """
    spec, shape = _image_input(source, size)
    types = infer_types(source, {spec.name: shape})
    statistics = statistics_of(source)
    blocks = cut_blocks(source, types, find_islands(source, types), Config())
    batch = types.batch or BATCH
    model = TorchModel.of(source, types, blocks, pick_device(device), batch)
    batches = -(-count // batch)
    made, first, last = [], 0.0, 0.0
    for number in range(batches):
        noise = torch.Generator(model.device).manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        x = laid_out(torch.randn((batch, *shape), generator=noise, device=model.device))
        done = number * _STEPS
        samples, losses = _distilled(
            model, spec, x, statistics, lambda step, loss, done=done: progress("distilling samples", done + step, batches * _STEPS, loss)
        )
        made.append(samples)
        first, last = first + losses[0] / batches, last + losses[1] / batches
    note = (
        f"{count} samples distilled from the statistics of {len(statistics)} BatchNorm layers (ZeroQ), whose distance to the samples "
        f"fell from {first:.4g} (noise) to {last:.4g}; no real sample was seen: prefer a few dozen of them where there are any"
    )
    return Samples({spec.name: torch.cat(made).cpu().numpy()[:count]}, note=note)


def statistics_of(source: SourceModel) -> list[NormStatistics]:
    """The statistics in a model's file whose values are in the normalised model.

    Raises:
        DataError: there are none.
    """
    statistics = [s for s in norm_statistics(source.path) if s.value in source.graph.producer]
    if not statistics:
        raise DataError(
            f"synthetic samples: {source.path} has no BatchNorm statistics to make them from: it never had any, or they are "
            "folded into the convolutions already; export the model with BatchNorm kept (torch.onnx.export(model.eval(), ..., "
            "training=TrainingMode.PRESERVE, do_constant_folding=False)), or give real samples"
        )
    return statistics


def _image_input(source: SourceModel, size: tuple[int, int] | None) -> tuple[InputSpec, tuple[int, ...]]:
    """The one input, and the shape of one sample of it."""
    where = "synthetic samples"
    if len(source.inputs) != 1 or source.inputs[0].dtype != np.float32 or source.inputs[0].axis != 0:
        raise DataError(f"{where}: are made for one float32 input [N, ...]; this model has {', '.join(map(str, source.inputs))}")
    spec = source.inputs[0]
    shape = list(spec.sample_shape)
    if size is not None and len(shape) == 3:
        channels_last = isinstance(shape[2], int) and shape[2] <= 4 and not (isinstance(shape[0], int) and shape[0] <= 4)
        shape[0 if channels_last else 1 : 2 if channels_last else 3] = size
    if not all(isinstance(axis, int) for axis in shape):
        raise DataError(f"{where}: the model leaves the size of its input open ({spec}); give --image-size HEIGHTxWIDTH")
    return spec, tuple(int(axis) for axis in shape if axis is not None)


def _distilled(
    model: TorchModel, spec: InputSpec, x: torch.Tensor, statistics: list[NormStatistics], progress: Callable[[int, float], None]
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Samples [N, ...] whose statistics are nearest, and the loss of the noise and of these."""
    wanted = {s.value: _on(s, model.device) for s in statistics}
    constants = [model.constants(piece) for piece in model.pieces]
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=_RATE)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=_PATIENCE)
    best, least, start = x.detach().clone(), float("inf"), float("nan")
    for step in range(_STEPS):
        terms: list[torch.Tensor] = []

        def observe(name: str, tensor: torch.Tensor, terms: list[torch.Tensor] = terms) -> torch.Tensor:
            if name in wanted and tensor.requires_grad:
                terms.append(_distance(tensor, wanted[name]))
            return tensor

        values: dict[str, torch.Tensor] = {spec.name: x}
        for piece, weights in zip(model.pieces, constants, strict=True):
            values |= piece({name: values[name] for name in piece.block.inputs} | weights, observe)
        if not terms:
            raise DataError(
                "synthetic samples: gradients reach no BatchNorm of the model through the operators that only ONNX Runtime "
                "executes (see `inspect`); give real samples"
            )
        loss = torch.stack(terms).sum()
        value = float(loss.detach())
        start = value if step == 0 else start
        if value < least:
            best, least = x.detach().clone(), value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(value)
        progress(step + 1, least)
        if optimizer.param_groups[0]["lr"] < _LOWEST_RATE:
            break
    return best, (start, least)


def _on(found: NormStatistics, device: torch.device) -> Mapping[str, torch.Tensor]:
    """The statistics as tensors, without silent channels (`heard` [C] is 1 for the others)."""
    heard = np.abs(found.gain) > _SILENT * np.abs(found.gain).max()
    gain = np.where(heard, found.gain, 1.0)
    arrays = {"offset": found.offset, "gain": gain, "deviation": found.deviation, "heard": heard}
    return {name: torch.tensor(np.asarray(array, np.float32)).to(device) for name, array in arrays.items()}


def _distance(made: torch.Tensor, wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """|mean - mu|^2 + |deviation - sigma|^2 over the channels (axis 1) of what BatchNorm read, from what it made."""
    axes = [axis for axis in range(made.dim()) if axis != 1]
    mean = (made.mean(axes) - wanted["offset"]) / wanted["gain"]
    deviation = (made.var(axes) + _EPSILON).sqrt() / wanted["gain"].abs()
    return ((mean.square() + (deviation - wanted["deviation"]).square()) * wanted["heard"]).sum()
