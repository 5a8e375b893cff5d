"""Time a float model and quantized files under ONNX Runtime, all in one process and in turn, with what they get right and what runs on
integers.

usage: python -m tests.benchmarks.latency MODEL.onnx --calibration C.npz --out RESULTS.json [--precisions w8a8,w4a4] [--batches 1,32]
           [--threads 1] [--seconds 10] [--sessions 1] [--target ort-cpu] [--peer NAME=FILE.onnx ...] [--eval E.npz] [--samples 128]

Ranges and rounding do not change the time, so the files come from `--algorithm mse`. Each figure is the fastest of all rounds: what other
processes take away only ever adds. `w8a8-full` is w8a8 with --no-reduce-range; `peers/int8.py` writes the files of other tools. Rows are
added to RESULTS.json. Prints Markdown tables.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exporters import export_qdq, write_model
from toolchain import report, runtime
from toolchain.config import Config
from toolchain.config_file import parse_precision
from toolchain.float_operators import INTEGER_PREFIXES, float_operators
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.samples import Preprocessing, Samples, load_samples
from toolchain.source import load_source
from toolchain.validation import agreement, class_output, top_k

_LAYERS = ("Conv", "Gemm", "MatMul")
_WHOLE_RANGE = "-full"


def opened(path: Path, threads: int) -> ort.InferenceSession:
    """A session as deployed, on a fixed number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=[runtime.CPU])


def fastest(sessions: Mapping[str, Sequence[ort.InferenceSession]], feeds: Mapping[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Fewest milliseconds of each file over its sessions, run in turn, in another order each round.

    What one leaves in the caches helps or hurts the next, and where a session's memory lies moves a few percent.
    """
    best, rng = dict.fromkeys(sessions, float("inf")), np.random.default_rng(0)
    opened_ = [(name, session) for name, several in sessions.items() for session in several]
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for index in rng.permutation(len(opened_)):
            name, session = opened_[index]
            start = time.perf_counter()
            session.run(None, feeds)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
        rounds += 1
    return best


def facts(path: Path, session: ort.InferenceSession, samples: Samples, reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a file gets right, and which of its layers run on integers."""
    found = runtime.run(session, samples.inputs)
    head = class_output(reference, samples.count)
    graph = runtime.optimized(path)
    kinds = Counter(node.op_type for node in graph.node)
    left = Counter(row.op_type for row in float_operators(graph))
    integer = {kind: count for kind, count in sorted(kinds.items()) if kind.startswith(INTEGER_PREFIXES)}
    return {
        "top1": top_k(found[head], samples.labels, 1) if head is not None and samples.labels is not None else None,
        "agreement": agreement(reference, found, head),
        "sqnr": min(sqnr(reference[name], found[name]) for name in reference),
        "integer_layers": sum(count for kind, count in integer.items() if any(layer in kind for layer in _LAYERS)),
        "float_layers": sum(count for kind, count in left.items() if any(layer in kind for layer in _LAYERS)),
        "integer_operators": integer,
        "float_operators": dict(sorted(left.items())),
        "conversions": kinds["QuantizeLinear"] + kinds["DequantizeLinear"],
        "bytes": path.stat().st_size,
    }


def times_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and ratios."""
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = [
        "| model | batch | threads | " + " | ".join(f"{n} ms" for n in names) + " | " + " | ".join(f"float / {n}" for n in names[1:]) + " |"
    ]
    lines.append("|" + "---|" * (2 + 2 * len(names)))
    for row in rows:
        ms = row["milliseconds"]
        times = " | ".join(f"{ms[n]:.3g}" if n in ms else "-" for n in names)
        ratios = " | ".join(f"{ms[names[0]] / ms[n]:.2f}" if n in ms else "-" for n in names[1:])
        lines.append(f"| {row['model']} | {row['batch']} | {row['threads']} | {times} | {ratios} |")
    return "\n".join(lines)


def files_table(results: Mapping[str, Any], ours: str) -> str:
    """Every file of every model: time over that of our file, layers on integers, accuracy."""
    batches = sorted({row["batch"] for row in results["rows"]})
    titles = ("model", "file", *(f"time over ours, batch {batch}" for batch in batches), "layers on integers", "other operators in float",
              "Q and DQ left", "top-1", "same as float", "SQNR dB")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for key, found in results["files"].items():
        model, name = key.split("/")
        times = {row["batch"]: row["milliseconds"] for row in results["rows"] if row["model"] == model and name in row["milliseconds"]}
        ratios = [f"{times[batch][name] / times[batch][ours]:.2f}" if batch in times else "-" for batch in batches]
        layers = found["integer_layers"] + found["float_layers"]
        others = sum(found["float_operators"].values()) - found["float_layers"]
        top1, same, noise = (f"{value:.{digits}f}" if value is not None else "-"
                             for value, digits in ((found["top1"], 2), (found["agreement"], 2), (found["sqnr"], 1)))  # fmt: skip
        cells = (model, name, *ratios, f"{found['integer_layers']} of {layers}", others, found["conversions"], top1, same, noise)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Quantize, time, score, add to the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precisions", default="w8a8,w4a4")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=1, help="of each file")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="a file of another tool for the same model")
    parser.add_argument("--eval", help="labelled samples to score every file on")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples of our files")
    args = parser.parse_args()
    source = load_source(args.model)
    samples = load_samples(args.calibration, source.inputs, Preprocessing(), "--calibration").first(args.samples)
    scored = load_samples(args.eval, source.inputs, Preprocessing(), "--eval") if args.eval else None
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = report.environment("cpu")
    results.setdefault("files", {})
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": args.model}
        for precision in args.precisions.split(","):
            whole = precision.endswith(_WHOLE_RANGE)  # weights of 8 bits where activations have 8, as other tools give them
            options: dict[str, Any] = parse_precision(precision.removesuffix(_WHOLE_RANGE))
            config = Config(**options, reduce_range=False if whole else None, algorithm="mse", device="cpu", target=args.target)
            files[precision] = Path(folder) / f"{precision}.onnx"
            write_model(export_qdq(source.model, quantize(source, samples, config).table, scheme=config.scheme), files[precision])
        files |= {name: Path(path) for name, path in (entry.split("=", 1) for entry in args.peer)}
        sessions = {name: [opened(path, args.threads) for _ in range(args.sessions)] for name, path in files.items()}
        for batch in map(int, args.batches.split(",")):
            feeds = {name: array[:batch] for name, array in samples.inputs.items()}
            milliseconds = {name: round(value, 4) for name, value in fastest(sessions, feeds, args.seconds).items()}
            row = {"model": args.model.stem, "batch": batch, "threads": args.threads, "milliseconds": milliseconds}
            key = (row["model"], batch, args.threads)
            results["rows"] = [old for old in results["rows"] if (old["model"], old["batch"], old["threads"]) != key] + [row]
        if scored is not None:
            reference = runtime.run(sessions["float"][0], scored.inputs)
            for name, path in files.items():
                results["files"][f"{args.model.stem}/{name}"] = facts(path, sessions[name][0], scored, reference)
    args.out.write_text(json.dumps(report.finite(results), indent=1) + "\n")
    print(times_table(results["rows"]))
    if results["files"]:
        print(files_table(results, args.precisions.split(",")[0]))


if __name__ == "__main__":
    main()
