"""Does the exported file do what was simulated, how well, how fast: measured under ONNX Runtime."""

import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from . import large, runtime
from .errors import UnsupportedModelError
from .float_operators import INTEGER_PREFIXES, FloatOperator, float_operators
from .graph import WEIGHT_INPUT
from .kernels import KernelCheck, check_kernels
from .metric import Measured, Metric
from .noise import sqnr
from .outcomes import pack
from .runtime import Optimization
from .samples import Samples, check_labels

_HEAVY = frozenset(
    {
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum"),
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "LSTM", "GRU", "RNN", "If", "Loop", "Scan"),
    }
)
# They pick rows or places by values: two that are nearly the same change places with the smallest error.
_SELECTING = frozenset({"TopK", "NonMaxSuppression", "NonZero", "Unique", "Compress", "ArgMax", "ArgMin"})
_LATENCY_SECONDS = 2.0
_LATENCY_RUNS = 100


@dataclass(frozen=True)
class Parity:
    """Agreement of two executions of the quantized model.

    `agreement` is the share of equal predictions (None without a class output), `sqnr` the ratio of signal to difference in dB, and
    `max_difference` the largest difference of an output, over the largest magnitude. Selections (`selections`) count for neither.
    """

    agreement: float | None
    sqnr: float
    max_difference: float


@dataclass(frozen=True)
class Latency:
    """Median milliseconds per run of one batch, both models in turn in the same process."""

    batch: int
    float_ms: float
    quantized_ms: float


@dataclass(frozen=True)
class ValidationReport:
    """What was measured, and on which provider and samples. Accuracies are in percent; None where there are no labels or no classes.

    `simulation` compares the deployed file with the torch simulation and `unfused` with its own unoptimised execution, through the whole
    network; `integer_arithmetic` does so operator by operator, and `simulated_arithmetic` compares the file as it is written with the
    simulation on every value. `lost` counts the samples that only the float model gets right, `won` those that only the quantized one does.
    `has_labels` says whether the samples came with labels, which a model without a class output leaves unused; `nan_samples` counts those
    on which an output of the float model has a NaN, which says nothing of the quantized one. `outcomes` keeps for each sample (see
    `outcomes`) whether the quantized model's class is the label, or the float model's without labels. Without `has_kernels`, ONNX Runtime
    stood in for another runtime: it computed in float between the quantizers, and its latency says nothing. `selected` names the
    outputs that are selections: the smallest error may put other rows there, so that their ratios say nothing. `metric` is what a measure
    of the user's own says, which labels are for then; there is no accuracy beside it.
    """

    provider: str
    samples: int
    top1_float: float | None
    top1_quantized: float | None
    top5_float: float | None
    top5_quantized: float | None
    lost: int | None
    won: int | None
    agreement: float | None
    sqnr: Mapping[str, float]
    simulation: Parity | None
    unfused: Parity | None
    integer_arithmetic: KernelCheck
    simulated_arithmetic: KernelCheck | None
    top1_simulated: float | None
    float_bytes: int
    quantized_bytes: int
    latency: Latency
    kernels: Mapping[str, int]
    float_operators: tuple[FloatOperator, ...] = ()
    outcomes: str | None = None
    has_labels: bool = False
    nan_samples: int = 0
    has_kernels: bool = True
    selected: tuple[str, ...] = ()
    metric: Measured | None = None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The output with the least signal to noise, and that, in dB; None where all outputs are selections."""
        told = [(ratio, name) for name, ratio in self.sqnr.items() if name not in self.selected]
        if not told:
            return None
        ratio, name = min(told)
        return name, ratio

    @property
    def drop(self) -> float | None:
        """What the metric lost; without one points of top-1 accuracy, or of agreement with the float model where there are no labels."""
        if self.metric is not None:
            return self.metric.drop
        if self.top1_float is not None and self.top1_quantized is not None:
            return self.top1_float - self.top1_quantized
        return 100.0 - self.agreement if self.agreement is not None else None

    @property
    def integer_operators(self) -> int:
        """Operators of the optimised graph that compute on integers."""
        return sum(count for kind, count in self.kernels.items() if kind.startswith(INTEGER_PREFIXES))

    @property
    def float_layers(self) -> dict[str, int]:
        """Operators with products in them (control flow may have some) that the optimised graph computes in float, and how many.

        None is named where all are by design (not `has_kernels`).
        """
        return {kind: count for kind, count in self.kernels.items() if kind in _HEAVY} if self.has_kernels else {}


def validate(
    float_model: onnx.ModelProto | Path,
    quantized: Path,
    samples: Samples,
    float_bytes: int,
    device: str = "auto",
    simulated: Mapping[str, np.ndarray] | None = None,
    simulated_arithmetic: KernelCheck | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
    as_written: bool = True,
    elsewhere: bool = False,
    metric: Metric | None = None,
) -> ValidationReport:
    """Run the float and the quantized model over samples and compare.

    Args:
        float_model: the float model.
        quantized: the exported file; it is run as it is, and (`as_written`) with ONNX Runtime's optimisations off.
        samples: evaluation samples, with labels where accuracy is wanted.
        float_bytes: size of the float file.
        device: `auto`, `cuda` or `cpu`.
        simulated: graph outputs of the torch simulation over the same samples.
        simulated_arithmetic: how the file compares with the simulation value by value, where that was measured.
        reference: what `float_outputs` gave for the same samples, where several files are held against it.
        as_written: whether the file is run without optimisations too, which takes longer than all else.
        elsewhere: the file is for another runtime (`Scheme.elsewhere`), so that it is run without ONNX Runtime's integer kernels, which
            saturate and overflow in their own ways.
        metric: what judges the outputs in place of accuracy.

    Raises:
        DataError: labels that are no classes of the model, or a metric that fails.
        UnsupportedModelError: ONNX Runtime does not load a file.
    """
    provider = runtime.pick_provider(device)
    float_session = runtime.session(float_model, provider)
    level = Optimization.UNFUSED if elsewhere else Optimization.DEFAULT
    deployed = runtime.session(quantized, provider, level)
    reference = runtime.run(float_session, samples.inputs) if reference is None else reference
    outputs = runtime.run(deployed, samples.inputs)
    unfused = runtime.run(runtime.session(quantized, provider, Optimization.NONE), samples.inputs) if as_written else None
    head = class_output(reference, samples.count)
    labels = samples.labels if metric is None else None
    if labels is not None and head is not None and has_scores(reference[head]):
        check_labels(labels, reference[head].shape[1], "labels")
    scored = labels if head is not None else None

    def accuracy(outputs: Mapping[str, np.ndarray] | None, k: int) -> float | None:
        if scored is None or head is None or outputs is None:
            return None
        if not has_scores(outputs[head]):
            return float((predicted(outputs[head]) == scored).mean() * 100) if k == 1 else None
        return top_k(outputs[head], scored, k) if outputs[head].shape[1] >= k else None

    right = [predicted(outputs[head]) == scored for outputs in (reference, outputs)] if scored is not None and head is not None else None
    same = predicted(reference[head]) == predicted(outputs[head]) if head is not None else None
    counted = right[1] if right is not None else same
    executed = runtime.optimized(quantized, provider, level)
    runs = [(reference, outputs), *([(simulated, outputs)] if simulated is not None else [])]
    written = large.load(quantized)
    chosen = tuple(name for name in selections(written, runs) if name != head)
    measured = None
    if metric is not None:
        of_simulated = metric.of(simulated, samples.labels, samples.count) if simulated and not _ragged(simulated, samples) else None
        of_float, of_quantized = _judged(metric, float_session, reference, samples), _judged(metric, deployed, outputs, samples)
        measured = Measured.of(metric, of_float, of_quantized, of_simulated)
    return ValidationReport(
        provider=deployed.get_providers()[0],  # the CPU's, where ONNX Runtime fell back to it
        samples=samples.count,
        top1_float=accuracy(reference, 1),
        top1_quantized=accuracy(outputs, 1),
        top5_float=accuracy(reference, 5),
        top5_quantized=accuracy(outputs, 5),
        lost=int((right[0] & ~right[1]).sum()) if right is not None else None,
        won=int((right[1] & ~right[0]).sum()) if right is not None else None,
        agreement=agreement(reference, outputs, head),
        sqnr={name: sqnr(reference[name], outputs[name]) for name in reference},
        simulation=parity(simulated, outputs, head, chosen) if simulated is not None else None,
        unfused=parity(unfused, outputs, head, chosen) if unfused is not None else None,
        integer_arithmetic=check_kernels(written, samples.inputs, provider, level),
        simulated_arithmetic=simulated_arithmetic,
        top1_simulated=accuracy(simulated, 1),
        float_bytes=float_bytes,
        quantized_bytes=large.file_bytes(quantized),
        latency=_latency(float_session, deployed, samples),
        kernels=dict(sorted(Counter(node.op_type for node in executed.node).items())),
        float_operators=() if elsewhere else float_operators(executed),
        outcomes=pack(counted) if counted is not None else None,
        has_labels=labels is not None,
        nan_samples=_nan_samples(reference, samples.count),
        has_kernels=not elsewhere,
        selected=chosen,
        metric=measured,
    )


def judged(metric: Metric, model: onnx.ModelProto | Path, samples: Samples, device: str = "auto") -> np.ndarray:
    """What a metric says of a model over samples: the values [N], or one [] for all.

    Raises:
        DataError: the metric fails.
        UnsupportedModelError: ONNX Runtime does not load the model.
    """
    opened = runtime.session(model, runtime.pick_provider(device))
    return _judged(metric, opened, runtime.run(opened, samples.inputs), samples)


def _judged(metric: Metric, opened: runtime.Session, outputs: Mapping[str, np.ndarray], samples: Samples) -> np.ndarray:
    """`outputs` are what the session made of the samples; those that do not count samples are made again, one sample at a time."""
    ragged = _ragged(outputs, samples)
    each = runtime.run_each(opened, samples.inputs, ragged) if ragged else {}
    return metric.of({name: each.get(name, array) for name, array in outputs.items()}, samples.labels, samples.count)


def _ragged(outputs: Mapping[str, np.ndarray], samples: Samples) -> list[str]:
    return [name for name, array in outputs.items() if array.shape[:1] != (samples.count,)]


@dataclass(frozen=True)
class Reference:
    """What a float model makes of samples, and what a metric says of that: for files that are tried one after another."""

    samples: Samples
    outputs: Mapping[str, np.ndarray]
    device: str = "auto"
    metric: Metric | None = None
    value: float | None = None

    @classmethod
    def of(cls, model: onnx.ModelProto | Path, samples: Samples, device: str = "auto", metric: Metric | None = None) -> "Reference":
        """Run the float model.

        Raises:
            DataError: the metric fails.
            UnsupportedModelError: ONNX Runtime does not load the model.
        """
        opened = runtime.session(model, runtime.pick_provider(device))
        outputs = runtime.run(opened, samples.inputs)
        value = float(_judged(metric, opened, outputs, samples).mean()) if metric is not None else None
        return cls(samples, outputs, device, metric, value)

    def held_against(self, quantized: Path, elsewhere: bool = False) -> tuple[float | None, float]:
        """The drop of a file as `ValidationReport.drop` has it, and dB of its worst output that is no selection (NaN where all are)."""
        level = Optimization.UNFUSED if elsewhere else Optimization.DEFAULT
        opened = runtime.session(quantized, runtime.pick_provider(self.device), level)
        outputs = runtime.run(opened, self.samples.inputs)
        head = class_output(self.outputs, self.samples.count)
        chosen = {name for name in selections(large.load(quantized), [(self.outputs, outputs)]) if name != head}
        ratio = min((sqnr(self.outputs[name], outputs[name]) for name in outputs if name not in chosen), default=float("nan"))
        if self.metric is not None and self.value is not None:
            return self.value - float(_judged(self.metric, opened, outputs, self.samples).mean()), ratio
        same = agreement(self.outputs, outputs, head)
        if head is None or self.samples.labels is None or same is None:
            return None if same is None else 100.0 - same, ratio
        right = [float((predicted(side[head]) == self.samples.labels).mean() * 100) for side in (self.outputs, outputs)]
        return right[0] - right[1], ratio


def float_outputs(model: onnx.ModelProto | Path, samples: Samples, device: str = "auto") -> dict[str, np.ndarray]:
    """The graph outputs of a float model over samples, for several `validate` to share."""
    return runtime.run(runtime.session(model, runtime.pick_provider(device)), samples.inputs)


def _nan_samples(outputs: Mapping[str, np.ndarray], count: int) -> int:
    """Samples on which an output has a NaN; all of them where an output that does not count samples has one."""
    found = np.zeros(count, bool)
    for array in outputs.values():
        if array.dtype.kind == "f" and (is_nan := np.isnan(array)).any():
            found |= is_nan.reshape(count, -1).any(axis=1) if array.shape[:1] == (count,) else True
    return int(found.sum())


def class_output(outputs: Mapping[str, np.ndarray], count: int) -> str | None:
    """The first output that scores classes: [N, C] with C > 1; of a model without float outputs else the first that names them: [N].

    What falls in every row is not scores of classes but the best of something, sorted (TopK).
    """
    kinds = "f" if any(array.dtype.kind == "f" for array in outputs.values()) else "iu"
    scored = (name for name, array in outputs.items() if has_scores(array) and array.shape[0] == count and array.dtype.kind in kinds)
    scores = (name for name in scored if not _is_sorted(outputs[name]))
    names = (name for name, array in outputs.items() if array.shape in ((count,), (count, 1)))
    return next(scores, next(names, None) if all(array.dtype.kind in "iub" for array in outputs.values()) else None)


def _is_sorted(array: np.ndarray) -> bool:
    return len(array) > 1 and array.shape[1] > 2 and bool((array[:, 1:] <= array[:, :-1]).all())


def has_scores(array: np.ndarray) -> bool:
    """Whether a class output is [N, C] with C > 1: scores, and not the classes themselves."""
    return array.ndim == 2 and array.shape[1] > 1


def predicted(array: np.ndarray) -> np.ndarray:
    """The classes [N] that a class output says."""
    return array.argmax(1) if has_scores(array) else array.reshape(-1)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of samples whose label is among the k highest scores [N, C]."""
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean() * 100)


def agreement(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], head: str | None) -> float | None:
    """Percent of equal predictions."""
    return float((predicted(a[head]) == predicted(b[head])).mean() * 100) if head is not None else None


def parity(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], head: str | None, selected: Collection[str] = ()) -> Parity:
    """Compare two executions over all outputs but selections; the worst output counts."""
    told = [name for name in a if name not in selected]
    noise = min((sqnr(a[name], b[name]) for name in told), default=float("inf"))
    return Parity(agreement(a, b, head), noise, max((_difference(a[name], b[name]) for name in told), default=0.0))


def selections(model: onnx.ModelProto, runs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]) -> tuple[str, ...]:
    """The outputs whose rows are picked by what the model computes: behind a selecting operator, or of other shapes in two runs.

    What a layer makes of a selection (the experts that a gate picks) is a value like others again.

    Args:
        model: a quantized one; only what follows from its quantizers counts.
        runs: outputs of two executions on the same samples.
    """
    computed, chosen = set[str](), {name for a, b in runs for name in a if a[name].shape != b[name].shape}
    for node in model.graph.node:
        is_computed = node.op_type == "QuantizeLinear" or not computed.isdisjoint(node.input)
        if is_computed:
            computed.update(node.output)
        if (is_computed and node.op_type in _SELECTING) or (node.op_type not in WEIGHT_INPUT and not chosen.isdisjoint(node.input)):
            chosen.update(node.output)
    return tuple(output.name for output in model.graph.output if output.name in chosen)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference over the largest magnitude of `a`; 1 where shapes or strings differ."""
    if a.shape != b.shape or a.dtype.kind in "OSU":
        return float(not np.array_equal(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-12))


def _repeated(opened: runtime.Session, samples: Samples, count: int) -> dict[str, np.ndarray]:
    """The first sample `count` times, as a session takes it."""
    some = {name: array[:1].repeat(count, axis=0) for name, array in samples.inputs.items()}
    return runtime.batched(some, runtime.session_axes(opened, some))


def _latency(first: runtime.Session, second: runtime.Session, samples: Samples) -> Latency:
    """Time both in turn, so that a drift of the machine's speed hits both alike."""
    batch = runtime.fixed_batch(first, samples.inputs) or 1
    feeds = _repeated(first, samples, batch)
    try:
        runtime.execute(first, feeds, [output.name for output in first.get_outputs()])
    except UnsupportedModelError:  # one sample is too few for some: pairs
        batch = min(runtime.BATCH, samples.count)
        feeds = _repeated(first, samples, batch)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _LATENCY_SECONDS
    for round_ in range(_LATENCY_RUNS):
        for opened, spent in zip((first, second), times, strict=True):
            start = time.perf_counter()
            opened.run(None, feeds)
            spent.append(time.perf_counter() - start)
        if time.perf_counter() > end and round_ >= 5:
            break
    float_ms, quantized_ms = (statistics.median(spent[2:]) * 1e3 for spent in times)
    return Latency(batch, float_ms, quantized_ms)
