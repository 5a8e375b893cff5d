"""A learned table for another target without learning again: what both sets of rules share is kept, the rest is calibrated."""

from dataclasses import dataclass, replace

import numpy as np

from .calibration import calibrate_bias, fit_bias
from .config import Config
from .grids import retied
from .pipeline import quantize
from .progress import Progress
from .quant_table import BIAS_BITS, QuantSpec, QuantTable, TensorQuant
from .samples import Samples
from .source import SourceModel


@dataclass(frozen=True)
class Retargeted:
    """A table under the rules of a target.

    `weights` and `activations` count the grids that are there, `kept_weights` and `kept_activations` those that were learned; `samples` are
    those that the others were calibrated on.
    """

    table: QuantTable
    weights: int
    kept_weights: int
    activations: int
    kept_activations: int
    samples: int


def settings_for(config: Config, target: str, storage: str | None) -> Config:
    """The settings that a table was learned with, for another target and without learning; kinds of grids are that target's.

    Raises:
        UsageError: the target has no such precision.
    """
    kinds = {"weight_scheme": None, "activation_scheme": None, "reduce_range": None}
    return replace(rounded_to_nearest(config), target=target, storage=storage, **kinds)


def rounded_to_nearest(config: Config) -> Config:
    """The settings without learning, on whatever device is there."""
    return replace(config, algorithm="mse", units="none", merge=(), device="auto", memory_budget=None)


def retargeted(
    source: SourceModel, learned: QuantTable, config: Config, samples: Samples, progress: Progress = lambda *_: None
) -> Retargeted:
    """Calibrate a model under the rules of a target, and take from a learned table what these rules allow.

    A weight keeps its grid and its codes where the target takes such a grid, the bias beside it its learned numbers, and an activation its
    learned step where it has a grid of the same kind. What is calibrated anew is rounded to nearest, with biases corrected.

    Args:
        source: the model that the table was learned on.
        learned: the table.
        config: settings, as of `settings_for`.
        samples: calibration samples.
        progress: called as the work proceeds.

    Raises:
        MrecgError: as `pipeline.quantize`.
    """
    fresh = quantize(source, samples, config, progress)
    placement, table = fresh.placement, dict(fresh.table.tensors)
    constants = (*placement.weights, *placement.stored)
    weights = {name for name in constants if name in learned and _serves(learned[name].spec, table[name].spec)}
    own = [name for name in placement.activations if name in learned and name not in placement.shared]
    steps = [name for name in own if _is_alike(learned[name], table[name])]
    table |= {name: replace(learned[name], copy=table[name].copy) for name in steps}
    table |= {name: learned[name] for name in weights}
    table = dict(retied(placement, QuantTable(table)).tensors)
    for name, bias in placement.biases.items():
        step, numbers = np.float32(table[bias.input].scale), fresh.table[name].dequantized()
        if bias.weight in weights:
            given = learned[name].dequantized() if name in learned else source.constants[name]
            if np.array_equal(fit_bias(learned[bias.weight], given, step).scale, learned[bias.weight].scale):
                numbers = given
            else:  # the codes of such a bias need wider steps of the weight, for which its codes were not learned
                weights.remove(bias.weight)
                table[bias.weight] = fit_bias(fresh.table[bias.weight], numbers, step)
        table[name] = calibrate_bias(numbers, table[bias.weight], step, BIAS_BITS)
    if config.scheme.bias == "float":
        beside = {source.graph.bias(node) for node in source.graph.weighted if source.graph.weight(node) in weights}
        table |= {name: learned[name] for name in beside if name is not None and name in learned}
    return Retargeted(QuantTable(table), len(constants), len(weights), len(placement.activations), len(steps), fresh.samples)


def _serves(learned: QuantSpec, wanted: QuantSpec) -> bool:
    """Whether codes on one grid are codes on another, which may have more bits or a zero point."""
    same = ("signed", "axis", "block", "float8")
    is_alike = all(getattr(learned, name) == getattr(wanted, name) for name in same)
    is_settled = wanted.summed is None or learned.summed == wanted.summed or learned.bits < 8
    return is_alike and is_settled and learned.bits <= wanted.bits and (learned.symmetric or not wanted.symmetric)


def _is_alike(learned: TensorQuant, wanted: TensorQuant) -> bool:
    """Whether an activation's learned grid is of the kind that is wanted, and its own."""
    return learned.spec == wanted.spec and learned.tied_to is None and learned.copy == wanted.copy
