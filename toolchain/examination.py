"""A finished table looked at: how each value sits on its grid, and how much each layer hurts."""

import torch

from .activations import TorchModel
from .config import Config
from .device import full_float32
from .fit import GridFit, activation_fits, weight_fits
from .importing import cut_blocks
from .pipeline import Quantized
from .progress import Progress
from .quant_table import QuantTable
from .samples import Samples
from .sensitivity import SAMPLES, Sensitivity, sensitivity
from .simulation import few_samples
from .source import SourceModel, infer_types


@full_float32()
def examine(
    source: SourceModel, quantized: Quantized, samples: Samples, limit: float | None, progress: Progress = lambda *_: None
) -> tuple[tuple[GridFit, ...], Sensitivity]:
    """How each value sits on its grid, and how much each layer hurts, over a few samples.

    Args:
        source: the normalised model.
        quantized: the finished table, and the islands that it leaves.
        samples: the first few are used.
        limit: seconds that the sensitivity may take before it is skipped; 0 skips it, None sets no limit.
        progress: called as the work proceeds.
    """
    model, few = _over_a_few(source, quantized, samples)
    table = quantized.table
    fits = (*weight_fits(model.source, table), *activation_fits(model, table, few))
    if limit == 0:
        return fits, Sensitivity(0, None, (), 0.0, "--no-sensitivity")
    return fits, _sensitivity(model, table, few, limit, progress)


@full_float32()
def layer_noise(source: SourceModel, quantized: Quantized, samples: Samples, progress: Progress = lambda *_: None) -> Sensitivity:
    """How much each layer hurts alone, whatever the time that it takes; see `examine`."""
    model, few = _over_a_few(source, quantized, samples)
    return _sensitivity(model, quantized.table, few, None, progress)


def _over_a_few(source: SourceModel, quantized: Quantized, samples: Samples) -> tuple[TorchModel, Samples]:
    few = few_samples(source, samples, SAMPLES)
    source = source.with_copies(quantized.table.copies)
    types = infer_types(source, few.shapes, few.inputs)
    blocks = cut_blocks(source, types, quantized.islands, Config())
    return TorchModel.of(source, types, blocks, torch.device(quantized.device), few.count), few


def _sensitivity(model: TorchModel, table: QuantTable, few: Samples, limit: float | None, progress: Progress) -> Sensitivity:
    return sensitivity(model, table, few, limit, lambda done, total: progress("sensitivity of layers", done, total, float("nan")))
