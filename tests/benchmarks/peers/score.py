"""Score a quantized ONNX file, or the logits of a simulation, against the float model on labelled data.

usage: score.py FLOAT.onnx --eval EVAL.npz [--quantized Q.onnx] [--logits L.npz] [--batch-size 100]

EVAL.npz holds the preprocessed input under the model's input name, and `labels`. L.npz holds `logits`, in the same order.
Prints one JSON object; for each of the two subjects given: top-1, agreement with the float model, SQNR of all logits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


def run(model: Path, inputs: dict[str, np.ndarray], batch_size: int) -> np.ndarray:
    """Logits of a model under ONNX Runtime's default options on the CPU; a fixed batch dimension overrides `batch_size`."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    x = inputs[entry.name]
    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None
    step = fixed or batch_size
    parts = []
    for i in range(0, len(x), step):
        chunk = x[i : i + step]
        real = len(chunk)
        if fixed and real < fixed:  # some exporters freeze the batch: fill the last one, then drop the filler
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], fixed - real, axis=0)])
        parts.append(session.run(None, {entry.name: chunk})[0][:real])
    return np.concatenate(parts)


def compare(reference: np.ndarray, candidate: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64).reshape(reference.shape)
    noise = float(((reference - candidate) ** 2).sum())
    sqnr = 10 * np.log10(float((reference**2).sum()) / noise) if noise else float("inf")
    guess = candidate.argmax(1)
    return {
        "top1": round(100 * float((guess == labels).mean()), 2),
        "agreement": round(100 * float((guess == reference.argmax(1)).mean()), 2),
        "sqnr_db": round(float(sqnr), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--batch-size", type=int, default=100)
    args = parser.parse_args()

    data = dict(np.load(args.eval))
    labels = data.pop("labels")
    reference = run(args.model, data, args.batch_size)
    report: dict[str, object] = {"n": len(labels), "top1_float": round(100 * float((reference.argmax(1) == labels).mean()), 2)}
    if args.logits:
        report["simulation"] = compare(reference, np.load(args.logits)["logits"], labels)
    if args.quantized:
        # A missing file and one that ONNX Runtime refuses are both results to report, not reasons to stop.
        try:
            logits = run(args.quantized, data, args.batch_size)
            report["file"] = {"loads": True, **compare(reference, logits, labels)}
        except Exception as error:
            report["file"] = {"loads": False, "error": str(error)[:500]}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
