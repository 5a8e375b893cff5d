"""Peak memory of a reconstruction against the estimate printed before it.

usage: python -m tests.benchmarks.memory MODEL.onnx --calibration DATA --out RESULTS.json [--samples 128] [--iterations 3] [--budget 2GB]
    [--units 4]

Peaks are sampled from /proc/self/status every 20 ms while `quantize` runs: anonymous memory, which the system cannot take back, and all of
it with mapped files. The bound is the estimate of blocks alone, or the budget; `most` is the estimate where blocks are joined to the
largest units that they may be. Validation is left out, and with `--units` all that comes after so many units: where images shrink, the
peak is among the first. Calibration data is what `mrecg-onnx quantize` takes; `--image-crop none` is passed on.
"""

import argparse
import contextlib
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

from toolchain import pipeline, report, survey
from toolchain.config import BATCH, Config
from toolchain.cpu import keep_freed_memory
from toolchain.data_config import DataConfig
from toolchain.progress import Progress
from toolchain.run_folder import RunFolder
from toolchain.samples import Preprocessing, load_samples
from toolchain.source import load_source


class Watch(threading.Thread):
    """Remembers the largest sizes of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self.done = False

    def run(self) -> None:
        while not self.done:
            for line in Path("/proc/self/status").read_text().splitlines():
                key, _, rest = line.partition(":")
                if key in self.peak:
                    self.peak[key] = max(self.peak[key], int(rest.split()[0]) * 1024)
            time.sleep(0.02)


class _EnoughError(Exception):
    """Raised where the rest is not wanted."""


def stopping_after(units: int | None) -> Progress:
    """A progress callback that ends a run after so many units; None: never."""
    begun: set[str] = set()

    def progress(what: str, _done: int, _total: int, _loss: float) -> None:
        if what.startswith("reconstructing"):
            begun.add(what)
        if units is not None and len(begun) > units:
            raise _EnoughError

    return progress


def main() -> None:
    """Quantize under the watch, add a row to the results, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--budget")
    parser.add_argument("--units", type=int)
    args = parser.parse_args()
    if args.budget is None:  # as the command line does
        keep_freed_memory()
    config = Config(
        device="cpu",
        iterations=args.iterations,
        calibration_samples=args.samples,
        range_samples=min(args.samples, 256),
        memory_budget=args.budget,
    )
    source = load_source(args.model)
    preprocessing = dataclasses.replace(Preprocessing.of(DataConfig()), crop=None)
    samples = load_samples(args.calibration, source.inputs, preprocessing, "--calibration", limit=args.samples)
    expected = survey.expected_memory(source, samples, survey.survey(source, samples, config), config)
    run = RunFolder.create(args.out.with_suffix(".run"), {"format": None}, "benchmark")
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    with contextlib.suppress(_EnoughError):
        pipeline.quantize(source, samples, config, stopping_after(args.units), run)
    watch.done = True
    run.remove()
    estimate = expected.total if config.memory is None else min(expected.total, config.memory)
    row: dict[str, Any] = {
        "model": args.model.stem,
        "samples": samples.count,
        "units": args.units,
        "batch": config.batch_size or BATCH,
        "budget": config.memory,
        "estimate": dataclasses.asdict(expected) | {"total": expected.total, "most": expected.most},
        "bound": estimate,
        "peak_anonymous": watch.peak["RssAnon"],
        "peak_with_files": watch.peak["VmRSS"],
        "peak_over_bound": round((watch.peak["RssAnon"] if config.memory else watch.peak["VmRSS"]) / estimate, 3),
        "peak_over_most": round(watch.peak["VmRSS"] / expected.most, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = report.environment("cpu")
    key = (row["model"], row["samples"], row["budget"])
    results["rows"] = [old for old in results["rows"] if (old["model"], old["samples"], old["budget"]) != key] + [row]
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
