"""Which flags to try next on a file that was diagnosed: each with the reason, and what was measured for it."""

import shlex
from collections.abc import Mapping
from types import MappingProxyType

from .config import PAPER_ITERATIONS, PRESETS
from .diagnosis import Diagnosis, LayerError
from .scheme import TARGETS

_WORTH_IT = 0.5  # dB of the output that a suggestion must gain
_CLIPPED = 0.02  # share of an activation beyond its grid from which its range is questioned; ranges of least error clip some on purpose
_UNCOVERED = 0.75  # share of the noise from which values beyond the ranges are the matter: ranges of least error at few bits stay below
_DOMINANT = 0.25  # share of all added noise from which one layer counts as the culprit
_MOST_OF_IT = 3.0  # dB that the output gains without something that makes half of its noise
_LEARNED_BACK = 1.0  # dB that learning makes up of what wider weights gain with rounding to nearest, at the least
_TO_NEAREST = ("minmax", "mse", "aciq", "lapq")


def suggestions(found: Diagnosis, wider: Mapping[str, float] = MappingProxyType({})) -> list[str]:
    """What to try, most promising first; a figure in dB is a gain of the worst output that was measured on this file as it is.

    `wider` is what more bits gain with rounding to nearest, by the precision.

    Learning makes up for what is quantized elsewhere, so that the gain of a new run may be larger, and that of a layer alone smaller.
    """
    texts = [
        *_learning(found),
        *_narrow_weights(found),
        *(_uncovered(found) or [*_uneven_channels(found), *_bits_of_all(found, wider)]),
        *_single_layers(found),
        *_ranges(found),
    ]
    iterations = found.settings.get("iterations", PRESETS.get(found.settings.get("preset", ""), PAPER_ITERATIONS))
    if found.settings.get("algorithm") not in _TO_NEAREST and iterations < PRESETS["default"]:
        texts.append(f"--preset default, or best: it was learned in {iterations} iterations a unit")
    return texts


def _learning(found: Diagnosis) -> list[str]:
    algorithm = found.settings.get("algorithm")
    if algorithm not in _TO_NEAREST or found.settings.get("number-format", "int") != "int":
        return []
    return [f"--algorithm qdrop: the weights were rounded to nearest ({algorithm}); learned rounding, steps and biases cost time only"]


def _bits_of_all(found: Diagnosis, wider: Mapping[str, float]) -> list[str]:
    """The next bits of weights or of activations, whichever gains more when all is rounded to nearest.

    Learning makes up for more of the weights' rounding than of the activations'.
    """
    gains = {label: gain for label, gain in wider.items() if gain >= _WORTH_IT}
    if not gains:
        return []
    learned = found.settings.get("algorithm") not in _TO_NEAREST
    held_back = {label: gain - (_LEARNED_BACK if learned and _has_more_weight(found, label) else 0.0) for label, gain in gains.items()}
    best = max(held_back, key=lambda label: held_back[label])
    others = "".join(f", {gain:.1f} dB with {label}" for label, gain in wider.items() if label != best)
    cost = "; layers with 16-bit inputs compute in float in ONNX Runtime" if best.endswith("a16") else ""
    return [f"-p {best}: with all rounded to nearest the output gains {gains[best]:.1f} dB by it{others}{cost}"]


def _has_more_weight(found: Diagnosis, label: str) -> bool:
    return not label.startswith(f"w{found.settings.get('weight-bits')}a")


def _narrow_weights(found: Diagnosis) -> list[str]:
    """The eighth bit of weights that meet 8-bit activations, where weights make most of the output's noise."""
    settings = found.settings
    target = TARGETS.get(settings.get("target", "ort-cpu"))
    is_narrow = target is not None and not target.pairs and settings.get("reduce-range", target.reduce_range)
    gain = found.gain_of_float_weights
    if not is_narrow or settings.get("weight-bits") != 8 or settings.get("activation-bits") != 8 or gain < _MOST_OF_IT:
        return []
    return [
        "--no-reduce-range: weights that meet 8-bit activations have 7 bits, which only x86 CPUs without VNNI instructions need; the "
        f"output gains {gain:.1f} dB when all weights are float"
    ]


def _uneven_channels(found: Diagnosis) -> list[str]:
    """Equalization, where the inputs that layers take from normalizations make much of the noise."""
    noise = _noise(found)
    part = sum(_power(layer.input) for layer in found.layers if layer.node in found.evenable)
    if part == 0 or part < _DOMINANT * noise:
        return []
    return [
        f"mrecg-onnx equalize, and quantize what it writes: {100 * part / noise:.0f} % of the rounding noise of the layers' weights "
        "and inputs is that of inputs from normalizations, whose channels it evens out"
    ]


def _single_layers(found: Diagnosis) -> list[str]:
    """Bits, or float, for the layers that add most noise, and for those whose gain by it was measured."""
    roomy = {layer.node for layer in found.layers if layer.has_room}

    def flag(node: str) -> str:
        return f"--bits {shlex.quote(f'{node}=w8a8')}" if node in roomy else f"--keep-float {shlex.quote(node)}"

    texts = []
    names, together = found.together
    if names and roomy.issuperset(names):
        share = sum(layer.share for layer in found.layers if layer.node in names)
        measured = f"; the output gains {together:.1f} dB when they are float" if together >= _WORTH_IT else ""
        texts.append(f"{' '.join(map(flag, names))}: of {len(found.layers)} layers these add {100 * share:.0f} % of all noise{measured}")
    else:
        dominant = [layer for layer in found.layers if layer.share >= _DOMINANT][:2]
        for row in dominant:
            measured = f"; the output gains {row.gain:.1f} dB when it alone is float" if (row.gain or 0.0) >= _WORTH_IT else ""
            texts.append(f"{flag(row.node)}: it adds {100 * row.share:.0f} % of all noise, most of it by {_part(row)}{measured}")
    gaining = sorted((row for row in found.layers if (row.gain or 0.0) >= _WORTH_IT), key=lambda row: -(row.gain or 0.0))
    new = [row for row in gaining if not any(flag(row.node) in text for text in texts)][:2]
    return texts + [f"{flag(row.node)}: the output gains {row.gain:.1f} dB when this layer alone is float" for row in new]


def _power(ratio: float | None) -> float:
    """The noise of what is on a grid, relative to its signal, from the ratio in dB; none of what is float."""
    return 10 ** (-ratio / 10) if ratio is not None else 0.0


def _noise(found: Diagnosis) -> float:
    """That of the weights and inputs of all layers."""
    return sum(_power(layer.weight) + _power(layer.input) for layer in found.layers)


def _part(layer: LayerError) -> str:
    return "its weight" if layer.weight is not None and (layer.input is None or layer.weight < layer.input) else "its input"


def _uncovered(found: Diagnosis) -> list[str]:
    """Calibration samples that cover such as these, where values beyond the ranges make most of the noise: a single sample can."""
    noise = _noise(found)
    beyond = sum(_power(layer.input) * layer.clip_noise for layer in found.layers)
    if beyond <= _UNCOVERED * noise:
        return []
    worst = max(found.layers, key=lambda layer: _power(layer.input) * layer.clip_noise)
    return [
        f"calibration samples that cover such as these: values beyond the calibrated ranges make {100 * beyond / noise:.0f} % of the "
        f"noise of the layers' weights and inputs, most at {worst.node} ({100 * worst.clipped:.1f} % of its input); a single sample can, "
        "see whether it is one that the model is made for"
    ]


def _ranges(found: Diagnosis) -> list[str]:
    clipping = [layer for layer in found.layers if layer.clipped >= _CLIPPED]
    if not clipping:
        return []
    worst = max(clipping, key=lambda layer: layer.clipped)
    other = "" if found.settings.get("activation-range") == "auto" else ", or --activation-range minmax"  # auto has tried it
    return [
        f"more or more varied calibration samples{other}: {100 * worst.clipped:.1f} % of the input of {worst.node} "
        f"lies beyond its grid on these samples ({len(clipping)} layers above {100 * _CLIPPED:g} %)"
    ]
