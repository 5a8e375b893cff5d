"""Time a float model and its quantized files under ONNX Runtime, all in one process and in turn; figures are ratios to the float model.

usage: python -m tests.benchmarks.latency MODEL.onnx --calibration C.npz --out RESULTS.json [--precisions w8a8,w4a4] [--batches 1,32]
           [--threads 1] [--seconds 10] [--target ort-cpu] [--peer NAME=FILE.onnx ...]

Ranges and rounding do not change the time, so the files come from `--algorithm mse`. Each figure is the fastest of all rounds: what other
processes take away only ever adds. Rows are added to RESULTS.json. Prints a Markdown table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exporters import export_qdq, write_model
from toolchain import report, runtime
from toolchain.config import Config, parse_precision
from toolchain.pipeline import quantize
from toolchain.samples import Preprocessing, load_samples
from toolchain.source import load_source


def opened(path: Path, threads: int) -> ort.InferenceSession:
    """A session as deployed, on a fixed number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=[runtime.CPU])


def fastest(sessions: dict[str, ort.InferenceSession], feeds: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Fewest milliseconds of each session, run in turn."""
    best = dict.fromkeys(sessions, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
        rounds += 1
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and ratios."""
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = [
        "| model | batch | threads | " + " | ".join(f"{n} ms" for n in names) + " | " + " | ".join(f"float / {n}" for n in names[1:]) + " |"
    ]
    lines.append("|" + "---|" * (2 + 2 * len(names)))
    for row in rows:
        ms = row["milliseconds"]
        times = " | ".join(f"{ms[n]:.3g}" for n in names)
        ratios = " | ".join(f"{ms[names[0]] / ms[n]:.2f}" for n in names[1:])
        lines.append(f"| {row['model']} | {row['batch']} | {row['threads']} | {times} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Quantize, time, add to the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precisions", default="w8a8,w4a4")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="a file of another tool for the same model")
    args = parser.parse_args()
    source = load_source(args.model)
    samples = load_samples(args.calibration, source.inputs, Preprocessing(), "--calibration").first(64)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = report.environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        sessions = {"float": opened(args.model, args.threads)}
        for precision in args.precisions.split(","):
            config = Config(**parse_precision(precision), algorithm="mse", device="cpu", target=args.target)
            path = Path(folder) / f"{precision}.onnx"
            write_model(export_qdq(source.model, quantize(source, samples, config).table, scheme=config.scheme), path)
            sessions[precision] = opened(path, args.threads)
        for name, path in (entry.split("=", 1) for entry in args.peer):
            sessions[name] = opened(Path(path), args.threads)
        for batch in map(int, args.batches.split(",")):
            feeds = {name: array[:batch] for name, array in samples.inputs.items()}
            milliseconds = {name: round(value, 4) for name, value in fastest(sessions, feeds, args.seconds).items()}
            row = {"model": args.model.stem, "batch": batch, "threads": args.threads, "milliseconds": milliseconds}
            key = (row["model"], batch, args.threads)
            results["rows"] = [old for old in results["rows"] if (old["model"], old["batch"], old["threads"]) != key] + [row]
            args.out.write_text(json.dumps(report.finite(results), indent=1) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
