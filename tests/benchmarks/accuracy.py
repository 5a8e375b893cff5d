"""Compare algorithms on one model at equal data, batch and iterations; every figure from the exported file under ONNX Runtime.

usage: python -m tests.benchmarks.accuracy MODEL.onnx --calibration C.npz --eval E.npz --out RESULTS.json
           [--precisions w4a4,w3a3,w2a4] [--methods mse,adaround,brecq,qdrop,mrecg+brecq,mrecg+qdrop] [--seeds 0]
           [--iterations 1000] [--batch-size 32] [--first-last 8|same] [--samples 1024] [--threads 2]

A method is an algorithm of the command line, with `mrecg+` in front for `--units loss` (else `--units none`); `mrecg:UNITS+` selects
another metric. Rows that RESULTS.json has already are not run again, so that a broken-off comparison continues. Prints a Markdown table.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from exporters import export_qdq, write_model
from toolchain import comparison, report
from toolchain.comparison import measured
from toolchain.config import Config
from toolchain.config_file import parse_precision
from toolchain.cpu import keep_freed_memory
from toolchain.device import pick_device
from toolchain.quant_table import QuantTable
from toolchain.samples import Preprocessing, load_samples
from toolchain.source import load_source


def configuration(method: str, precision: str, seed: int, args: argparse.Namespace) -> Config:
    """The settings of one row."""
    base = Config(
        **parse_precision(precision),
        seed=seed,
        iterations=args.iterations,
        batch_size=args.batch_size,
        first_last_bits=args.first_last,
        calibration_samples=args.samples,
        device=args.device,
    )
    return comparison.method(method, base)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, best readable sorted by precision."""
    lines = ["| precision | method | seed | top-1 | drop | agreement | SQNR dB | sim = ORT | s | CPU s | units |", "|" + "---|" * 11]
    for row in rows:
        lines.append(
            f"| {row['precision']} | {row['method']} | {row['seed']} | {row['top1']:.2f} | {row['top1_float'] - row['top1']:+.2f} | "
            f"{row['agreement']:.2f} | {row['sqnr']:.2f} | {row['simulation_agreement']:.2f} | {row['seconds']:.0f} | "
            f"{row['cpu_seconds']:.0f} | {len(row['units'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precisions", default="w4a4")
    parser.add_argument("--methods", default="mse,adaround,brecq,qdrop,mrecg+brecq,mrecg+qdrop")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--first-last", default="8", choices=["8", "same"])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    source = load_source(args.model)
    calibration = load_samples(args.calibration, source.inputs, Preprocessing(), "--calibration")
    evaluation = load_samples(args.eval, source.inputs, Preprocessing(), "--eval")
    if args.eval_samples is not None:
        evaluation = evaluation.first(args.eval_samples)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = report.environment(str(pick_device(args.device)))
    keys = ("model", "precision", "method", "seed", "iterations", "batch_size", "first_last", "calibration_samples")
    done = {tuple(row[key] for key in keys) for row in results["rows"]}

    def export(table: QuantTable, config: Config, path: Path) -> None:
        write_model(export_qdq(source.model, table, scheme=config.scheme), path)

    for precision in args.precisions.split(","):
        for method in args.methods.split(","):
            for seed in map(int, args.seeds.split(",")):
                config = configuration(method, precision, seed, args)
                count = min(args.samples, calibration.count)
                key = (args.model.stem, precision, method, seed, args.iterations, args.batch_size, args.first_last, count)
                if key in done:
                    continue
                row = measured(source, calibration, evaluation, config, export) | dict(zip(keys, key, strict=True))
                results["rows"].append(row | {"threads": args.threads, "config": dataclasses.asdict(config)})
                args.out.write_text(json.dumps(report.finite(results), indent=1) + "\n")
                print(table([row]).splitlines()[-1], flush=True)
    print(table([row for row in results["rows"] if row["model"] == args.model.stem]))


if __name__ == "__main__":
    main()
