"""Does a model that was rewritten when it was loaded still compute what its file says? Both are run on a few samples."""

from collections.abc import Mapping

import numpy as np

from . import runtime
from .errors import UnsupportedModelError
from .noise import sqnr
from .samples import Samples
from .simulation import few_samples
from .source import SourceModel
from .wording import counted

LEAST = 40.0  # dB: float32 sums in another order stay far above, other coordinates, axes or modes far below
_SAMPLES = 4


def check_rewritten(source: SourceModel, samples: Samples) -> str | None:
    """Compare the outputs of a rewritten float model with those of its file; what a report should say of it, None where nothing was.

    Raises:
        UnsupportedModelError: they differ, or ONNX Runtime does not run the file.
    """
    if source.rewritten is None:
        return None
    few = few_samples(source, samples, _SAMPLES)
    session = runtime.session(source.path)
    wanted, found = (runtime.run(s, few.inputs) for s in (session, runtime.session(source.model)))
    ratio, worst = worst_output(wanted, found)
    if ratio < LEAST:
        said = f"{source.rewritten}; whether it computes what the file says was not compared: the file itself gives other results"
        for inputs, why in ((few.inputs, "each time"), (_nudged(few.inputs), "when its input moves by the smallest step of its type")):
            if worst_output(wanted, runtime.run(session, inputs))[0] < LEAST:
                return f"{said} {why}"
        raise UnsupportedModelError(
            f"{source.path}: {source.rewritten}, and then computes something else: its output {worst!r} agrees with the file's to "
            f"{ratio:.1f} dB on {counted(few.count, 'sample')}; export the model again in opset 13 or newer, in float32"
        )
    agreement = "exactly" if np.isinf(ratio) else f"to {ratio:.0f} dB"
    return f"{source.rewritten}, and computes what the file says {agreement} on {counted(few.count, 'sample')}"


def _nudged(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of which each float is the next one up."""
    return {name: np.nextafter(x, np.array(np.inf, x.dtype)) if x.dtype.kind == "f" else x for name, x in inputs.items()}


def worst_output(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> tuple[float, str]:
    """The output that agrees least, in dB; infinite where all agree exactly."""
    return min(((sqnr(wanted[name], found[name]), name) for name in wanted), default=(float("inf"), ""))
