"""What the peer runners share: arguments, cost of a run, result file. Imported by scripts that run in different environments."""

import argparse
import json
import os
import resource
import time
from pathlib import Path


def base_parser(description: str, iterations: int, meaning: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="npz of preprocessed float32 inputs keyed by input name")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--first-last", choices=["8", "same"], default="same", help="bits of both end layers")
    parser.add_argument("--iterations", type=int, default=iterations, help=meaning)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eval", type=Path, help="npz of inputs (and labels): also write the simulation's logits.npz")
    parser.add_argument("--placement", choices=["inputs", "stock"], default="inputs", help="what to quantize among activations: "
                        "only what weighted layers read, or whatever the tool quantizes by itself")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    return parser


class Cost:
    """Wall and processor time from the start of a run."""

    def __init__(self) -> None:
        self.load, self.start, self.optimisation = os.getloadavg()[0], time.perf_counter(), 0.0
        self.optimisation_cpu = 0.0
        self.seconds = self.cpu = 0.0

    def stop(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.seconds, self.cpu = time.perf_counter() - self.start, usage.ru_utime + usage.ru_stime


def write_result(args: argparse.Namespace, cost: Cost, error: str | None, **more: object) -> None:
    """Write OUT/result.json: what was asked (`args`), what was applied (in `more`), what it cost, whether the export worked."""
    bits = ["weight_bits", "activation_bits", "first_last", "placement"]
    asked = ["samples", *bits, "iterations", "batch_size", "seed", "threads"]
    result = {
        **more, "model": args.model.name, **{key: getattr(args, key) for key in asked},
        "seconds": round(cost.seconds, 1), "optimisation_seconds": round(cost.optimisation, 1),
        "optimisation_cpu_seconds": round(cost.optimisation_cpu, 3), "cpu_seconds": round(cost.cpu, 1),
        "load_before": round(cost.load, 2), "load_after": round(os.getloadavg()[0], 2),
        "export_ok": error is None, "export_error": error,
    }  # fmt: skip
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "applied"}, indent=1))
