"""Whether to ship: what a validation means for the one who deploys the model, in one sentence and with its reason."""

import math
from dataclasses import dataclass

from .intervals import paired_difference, wilson
from .metric import Measured
from .validation import ValidationReport
from .wording import figure

# Codes on rounding ties flip, and a deep network amplifies that, at most until the two executions are as independent as two roundings: then
# they differ by 3 dB more than either from the float model. What is beyond is an error.
_PARITY_AGREEMENT = 99.0  # percent of predictions
_PARITY_SQNR = 20.0  # dB, where there are no classes
_PARITY_MARGIN = 4.0  # dB
_PARITY_STEPS = 2.0  # rounding explains one step
_DROWNED = 3.0  # dB, where noise has half the power of the signal
_YARDSTICK = 1.0  # points of accuracy, where --max-drop names no other limit


@dataclass(frozen=True)
class Verdict:
    """`ship` is yes, no or unclear; `sentence` gives the reason, and what would make it clear."""

    ship: str
    sentence: str


def parity_problem(checked: ValidationReport) -> str | None:
    """Why a file is not what was learned: ONNX Runtime computes something else on this machine. None where it is."""
    arithmetic = checked.integer_arithmetic
    if arithmetic.steps >= _PARITY_STEPS:
        return (
            f"{arithmetic.worst}: on this machine ONNX Runtime's kernel is {arithmetic.steps:.0f} steps off what the file says "
            f"({arithmetic.share:.2g} % of all codes differ); the model was written. Where that is a layer with 8-bit weights and "
            "activations, its products saturate on x86 CPUs without VNNI instructions: --reduce-range avoids that; else keep the operator "
            "that makes the value in float with --keep-float"
        )
    exactness = checked.simulated_arithmetic
    if exactness is not None and exactness.steps >= _PARITY_STEPS:
        return (
            f"{exactness.worst}: the written file is {exactness.steps:.0f} steps off the simulation there ({exactness.share:.2g} % of all "
            "codes differ): it is not the model that was learned. This is a defect of the exporter, please report it"
        )
    found, worst = checked.simulation, checked.worst
    error = worst[1] if worst is not None else -math.inf  # of selections nothing is told; their operators were compared above
    if found is None or found.sqnr >= error - _PARITY_MARGIN:
        return None
    if found.sqnr >= _PARITY_SQNR if found.agreement is None else found.agreement >= _PARITY_AGREEMENT:
        return None
    return (
        f"ONNX Runtime differs from the simulation ({found.sqnr:.1f} dB) more than the quantized model from the float one "
        f"({error:.1f} dB): the model was written, but its accuracy is not the one that was learned"
    )


def intervals(checked: ValidationReport) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the accuracies and the agreement in percent, and of the paired drop, in points or the metric's unit."""
    n = checked.samples
    shares = {"top1_float": checked.top1_float, "top1_quantized": checked.top1_quantized, "agreement": checked.agreement}
    found = {key: wilson(round(share * n / 100), n) for key, share in shares.items() if share is not None}
    if checked.metric is not None:
        if checked.metric.low is not None and checked.metric.high is not None:
            found["drop"] = (checked.metric.low, checked.metric.high)
    elif checked.lost is not None and checked.won is not None:
        found["drop"] = paired_difference(checked.lost, checked.won, n)
    elif checked.agreement is not None:
        low, high = found["agreement"]
        found["drop"] = (100 - high, 100 - low)
    return found


def verdict(checked: ValidationReport, max_drop: float | None, is_held_out: bool) -> Verdict:
    """Judge a validated model against `--max-drop`, or against one point where no limit was given.

    Args:
        checked: the validation.
        max_drop: the limit in points; None for the yardstick of one point.
        is_held_out: whether the samples are others than those that were calibrated on.
    """
    problem = parity_problem(checked)
    if problem is not None:
        return Verdict("no", f"ONNX Runtime does not compute what was learned: {problem}")
    if checked.metric is not None:
        return _by_metric(checked.metric, max_drop, is_held_out)
    if checked.worst is None and checked.drop is None:
        return Verdict(
            "unclear",
            f"the outputs ({', '.join(checked.selected)}) are selections, in which the smallest error may put other rows, so that no ratio "
            "says how good they are; judge in your own metric",
        )
    output, error = checked.worst or min(checked.sqnr.items(), key=lambda item: item[1])
    if checked.top1_float is None and error < _DROWNED:
        return Verdict("no", f"output {output!r} has noise of more than half its power (SQNR {error:.1f} dB)")
    if checked.drop is None:
        return Verdict("unclear", f"there are no classes to compare; judge by the SQNR of {error:.1f} dB in your own metric")
    limit = _YARDSTICK if max_drop is None else max_drop
    named = f"the yardstick of {limit:g} point without --max-drop" if max_drop is None else f"--max-drop {limit:g}"
    low, high = intervals(checked)["drop"]
    moved = f"{abs(checked.drop):.2f} points {'lower' if checked.drop > 0 else 'higher'}" if checked.drop else "the same"
    drop = f"accuracy is {moved} (95 %: {-high:+.2f} to {-low:+.2f})"
    if checked.top1_float is None:
        drop = f"{checked.drop:.2f} % of the predictions differ from the float model's (95 %: {low:.2f} to {high:.2f}; if the output "
        drop += f"is no class scores, judge by its SQNR of {error:.1f} dB in your own metric)"
    easy = "" if is_held_out else ", even on the samples it was calibrated on"
    if max_drop is not None and checked.drop > max_drop:
        return Verdict("no", f"{drop}{easy}; the limit is {named}")
    is_bound = checked.top1_float is None and max_drop is None  # predictions that differ may be no worse
    if low > limit and not is_bound:
        return Verdict("no", f"{drop}{easy}, more than {named}")
    if not is_held_out:
        return Verdict("unclear", f"{drop}, but on the samples it was calibrated on; give --eval-data")
    if high <= limit:
        return Verdict("yes", f"{drop}, within {named}")
    if is_bound:
        return Verdict("unclear", f"{drop}; accuracy drops by that at most, labels would tell by how much")
    more = "more labelled samples" if checked.top1_float is not None else "more samples"
    return Verdict("unclear", f"{drop}: {named} lies within the interval; {more} would decide")


def _by_metric(found: Measured, max_drop: float | None, is_held_out: bool) -> Verdict:
    moved = f"{figure(abs(found.drop))} {'lower' if found.drop > 0 else 'higher'}" if found.drop else "the same"
    interval = f"95 %: {figure(-found.high)} to {figure(-found.low)}" if found.low is not None and found.high is not None else ""
    text = f"{found.name} is {moved}{f' ({interval})' if interval else ''}"
    if max_drop is None:
        return Verdict("unclear", f"{text}; --max-drop says how much of it may be lost")
    named = f"--max-drop {max_drop:g}"
    if found.drop > max_drop:
        return Verdict("no", f"{text}{'' if is_held_out else ', even on the samples it was calibrated on'}; the limit is {named}")
    if not is_held_out:
        return Verdict("unclear", f"{text}, but on the samples it was calibrated on; give --eval-data")
    if found.high is None:
        return Verdict("yes", f"{text}, within {named}; one number for all samples has no interval")
    if found.high <= max_drop:
        return Verdict("yes", f"{text}, within {named}")
    return Verdict("unclear", f"{text}: {named} lies within the interval; more samples would decide")
