"""What the next bits of weights, or of activations, are worth: measured with everything rounded to nearest.

What a file that was learned gains when its weights or activations are float says little: what was learned makes up for the rounding that is
then gone. Rounding to nearest takes seconds and has nothing to unlearn.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from . import runtime
from .config import Config
from .config_file import settings_of, split
from .device import pick_device
from .errors import UsageError
from .noise import sqnr
from .pipeline import quantize
from .progress import Progress
from .retarget import rounded_to_nearest
from .samples import Samples
from .simulation import simulate
from .source import SourceModel

SAMPLES = 64  # each to calibrate and to measure on: with 16 the larger gain was not always found, with 64 it was, on five models
_LEAST = 8
_NEXT = {2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8, 8: 16}


def gains_of_wider(
    source: SourceModel, settings: Mapping[str, Any], samples: Samples, progress: Progress = lambda *_: None
) -> dict[str, float]:
    """What the worst output gains, in dB, by the precision; nothing where no wider one is possible, or where a file does not say its own.

    Args:
        source: the float model.
        settings: those that a file was made with, by their flag names.
        samples: the first half is calibrated, the second measured on; of fewer than 16 nothing is told.
        progress: called as the work proceeds.
    """
    try:
        config = split(settings_of(settings, "settings"))[0] if settings else None
    except UsageError:  # of another version
        return {}
    half = min(samples.count // 2, SAMPLES)
    if config is None or config.precision.float8 or half < _LEAST:
        return {}
    plain = rounded_to_nearest(config)
    found = wider(plain)
    if not found:
        return {}
    seen, others = samples.first(half), samples.taken(np.arange(half, 2 * half))
    floats = runtime.run(runtime.session(source.model), others.inputs)
    ratios = []
    for turn, one in enumerate((plain, *found)):
        progress("trying more bits", turn, 1 + len(found), float("nan"))
        made = quantize(source, seen, one)
        outputs = simulate(source, made.table, others, pick_device(one.device), made.islands, one.scheme)
        ratios.append(min((sqnr(floats[name], outputs[name]) for name in floats if floats[name].dtype.kind == "f"), default=float("nan")))
    return {one.label: ratio - ratios[0] for one, ratio in zip(found, ratios[1:], strict=True) if np.isfinite(ratio - ratios[0])}


def wider(config: Config) -> tuple[Config, ...]:
    """The settings with the next bits of weights, and those with the next of activations, as far as the target has them."""
    changes: list[Mapping[str, int]] = []
    if config.weight_bits < 8:
        changes.append({"weight_bits": _NEXT[config.weight_bits]})
    if config.activation_bits in _NEXT:
        changes.append({"activation_bits": _NEXT[config.activation_bits]})
    found = []
    for change in changes:
        try:
            found.append(replace(config, **change))
        except UsageError:  # the target has no such precision
            continue
    return tuple(found)
