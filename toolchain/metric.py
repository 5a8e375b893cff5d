"""A measure of the user's own in place of top-1 accuracy: mean average precision, word errors, intersection over union."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DataError
from .intervals import paired_mean
from .user_code import function_at, users_code

OPTION = "--metric"
Outputs = Mapping[str, np.ndarray | list[np.ndarray]]
"""Arrays [N, one sample's shape] by output name; of an output whose shape follows from the data a list of N arrays."""


@dataclass(frozen=True)
class Metric:
    """What judges the outputs over all evaluation samples: a function at `place` (`module:function`) of outputs and labels.

    It is given the `Outputs` and the labels as they came with the samples (None without), and returns one number for each sample, of which
    the mean counts, or one for all. Higher is better.
    """

    place: str
    function: Callable[[Outputs, np.ndarray | None], Any]

    @classmethod
    def at(cls, place: str) -> "Metric":
        """The metric at `module:function`.

        Raises:
            DataError: there is none.
        """
        return cls(place, function_at(place, OPTION))

    @property
    def name(self) -> str:
        return self.place.rpartition(":")[2]

    def of(self, outputs: Outputs, labels: np.ndarray | None, count: int) -> np.ndarray:
        """The values [N] of N = `count` samples, or the one value [] of all.

        Raises:
            DataError: the function fails, or returns something else or no finite numbers.
        """
        given = {
            name: [*map(np.copy, some)] if isinstance(some, list) else some.copy() for name, some in outputs.items()
        }  # it may work in place
        with users_code(f"{OPTION} {self.place}"):
            values = np.asarray(self.function(given, None if labels is None else labels.copy()), np.float64)
        if values.shape not in ((), (count,)):
            raise DataError(
                f"{OPTION} {self.place}: returned shape {list(values.shape)}; expected one number, or one for each of {count} samples"
            )
        if not np.isfinite(values).all():
            which = f" for sample {int(np.argmin(np.isfinite(values)))}" if values.ndim else ""
            raise DataError(f"{OPTION} {self.place}: returned NaN or an infinite number{which}")
        return values


@dataclass(frozen=True)
class Measured:
    """What a metric says of the float model, the quantized file, and the simulation (None where there was none), in its own unit.

    `low` and `high` are the 95 % interval of the drop, paired by samples; None where the metric gives one number for all.
    """

    name: str
    float_value: float
    quantized_value: float
    simulated_value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, metric: Metric, reference: np.ndarray, quantized: np.ndarray, simulated: np.ndarray | None = None) -> "Measured":
        """From the values that a metric gave for each."""
        low, high = paired_mean(reference - quantized) if reference.ndim and len(reference) > 1 else (None, None)
        value = None if simulated is None else float(simulated.mean())
        return cls(metric.name, float(reference.mean()), float(quantized.mean()), value, low, high)

    @property
    def drop(self) -> float:
        return self.float_value - self.quantized_value
