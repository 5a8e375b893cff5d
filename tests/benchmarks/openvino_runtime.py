"""Run quantized files on a second runtime, OpenVINO, beside ONNX Runtime: accuracy, agreement, equal outputs, and which layers are integer.

usage: python tests/benchmarks/openvino_runtime.py --eval EVAL.npz --out RESULTS.json FILE.onnx ...

Needs openvino, onnxruntime and numpy, and nothing of this project, so that it can run in an environment of its own. EVAL.npz holds the
model's input by name, and `labels`. Both runtimes use the CPU, one thread, with default options otherwise; `as_written` is ONNX Runtime
without graph optimisation, which by default rounds float biases to int32 steps.
"""

import argparse
import json
import platform
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_LAYERS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Eltwise", "Pooling")
_BATCH = 50


def openvino_run(path: Path, x: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Outputs [N, C], and the layers of the execution graph by kind, precision and kernel."""
    ov = import_module("openvino")
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    layers: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")}
        if facts["layerType"] in _LAYERS:
            layers[" ".join(facts.values())] += 1
    outputs = [compiled(x[i : i + _BATCH])[0] for i in range(0, len(x), _BATCH)]
    return np.concatenate(outputs), dict(sorted(layers.items()))


def onnxruntime_run(path: Path, x: np.ndarray, level: ort.GraphOptimizationLevel) -> np.ndarray:
    """Outputs [N, C]."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: x[i : i + _BATCH]})[0]) for i in range(0, len(x), _BATCH)])


def compared(path: Path, x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """One row of the results."""
    found, layers = openvino_run(path, x)
    levels = ort.GraphOptimizationLevel
    written, default = (onnxruntime_run(path, x, level) for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL))
    runs = {"openvino": found, "as_written": written, "onnxruntime": default}
    top1 = {name: round(float((out.argmax(1) == labels).mean() * 100), 2) for name, out in runs.items()}
    difference = np.abs(found - written).max(axis=1)
    return {
        "file": path.name,
        "samples": len(x),
        "top1": top1,
        "points_from_as_written": round(top1["openvino"] - top1["as_written"], 2),
        "points_from_onnxruntime": round(top1["openvino"] - top1["onnxruntime"], 2),
        "agreement_with_as_written": round(float((found.argmax(1) == written.argmax(1)).mean() * 100), 2),
        "equal_outputs_percent": round(float((difference <= 1e-4 * np.ptp(written)).mean() * 100), 2),
        "openvino_layers": layers,
    }


def main() -> None:
    """Compare every file and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = np.load(args.eval)
    name = next(key for key in data.files if key != "labels")
    results = {
        "environment": {
            "openvino": version("openvino"),
            "onnxruntime": ort.__version__,
            "processor": platform.processor() or platform.machine(),
        },
        "rows": [compared(path, data[name], data["labels"]) for path in args.files],
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
