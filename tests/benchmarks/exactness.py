"""How exact are the files? Every value of the deployed graph against the torch simulation, and every integer kernel against the file.

usage: python -m tests.benchmarks.exactness --out exactness.json MODEL.onnx=SAMPLES.npz ... [--precisions w8a8,w4a4] [--target ort-cpu]
           [--samples 4] [--range-samples 32]

For each model and precision the grids are those of `--algorithm mse`; how they came about does not matter here. `simulation`: the file,
executed by ONNX Runtime without optimisation, against the simulation; `kernels`: its default execution against the one without
optimisation. Both cut the graph at every quantized value and name the worst one. Differences of quantized values are in their own steps,
those of floats in steps of 8 bits over their range. SAMPLES.npz holds the inputs by name; `random:SEED` draws token ids for a model of
integer inputs. Prints a Markdown table; the JSON has a row for each value that is not exact.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import export_qdq, write_model
from toolchain import report
from toolchain.config import Config
from toolchain.config_file import parse_precision
from toolchain.kernels import Difference, KernelCheck, kernel_differences, simulation_differences
from toolchain.pipeline import quantize
from toolchain.runtime import kernel_counts
from toolchain.samples import Samples
from toolchain.simulation import few_samples, simulated_values
from toolchain.source import SourceModel, load_source

_TOKENS, _VOCABULARY = 32, 30000
_EXACT = 0.01  # steps: float rounding


def samples_of(source: SourceModel, place: str) -> Samples:
    """The inputs of an npz file, or token ids with masks of ones and types of zeros."""
    if not place.startswith("random:"):
        data = np.load(place)
        return Samples({spec.name: data[spec.name] for spec in source.inputs})
    draw = np.random.default_rng(int(place.removeprefix("random:")))
    known = {"attention_mask": np.ones((32, _TOKENS), np.int64), "token_type_ids": np.zeros((32, _TOKENS), np.int64)}
    return Samples({spec.name: known.get(spec.name, draw.integers(0, _VOCABULARY, (32, _TOKENS))) for spec in source.inputs})


def facts(found: Sequence[Difference]) -> dict[str, Any]:
    """The figures of one comparison."""
    codes, floats = ([d for d in found if d.is_code == kind] for kind in (True, False))
    check = KernelCheck.of(found)
    return {
        "codes": len(codes),
        "code_steps": max((d.steps for d in codes), default=0.0),
        "floats": len(floats),
        "float_steps": max((d.steps for d in floats), default=0.0),
        "codes_moved_percent": check.share,
        "worst": check.worst,
        "not_exact": [asdict(d) for d in sorted(found, key=lambda d: -d.steps) if d.steps > _EXACT],
    }


def row(model: Path, place: str, precision: str, target: str, samples: int, range_samples: int, folder: Path) -> dict[str, Any]:
    """One model at one precision."""
    source = load_source(model)
    data = samples_of(source, place)
    config = Config(
        **parse_precision(precision),
        target=target,
        algorithm="mse",
        device="cpu",
        calibration_samples=range_samples,
        range_samples=range_samples,
    )
    quantized = quantize(source, data.first(range_samples), config)
    exported = export_qdq(source.model, quantized.table, scheme=config.scheme)
    few = few_samples(source, data, samples)
    values = simulated_values(source, quantized.table, few, quantized.islands)
    path = folder / f"{model.stem}.{target}.{precision}.onnx"
    write_model(exported, path)
    kinds = kernel_counts(path)
    path.unlink()
    return {
        "model": model.stem,
        "precision": precision,
        "target": target,
        "samples": few.count,
        "islands": len(quantized.islands),
        "integer_kernels": {kind: count for kind, count in kinds.items() if kind.startswith(("QLinear", "QGemm", "MatMulInteger"))},
        "simulation": facts(simulation_differences(exported, quantized.table, values, few.inputs)),
        "kernels": facts(kernel_differences(exported, few.inputs)),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| model | precision | quantized values | worst, steps | codes moved % | floats between | worst, 1/255 of range "
        "| kernels: worst, steps | codes moved % |",
        "|" + "---|" * 9,
    ]
    for entry in rows:
        first, second = entry["simulation"], entry["kernels"]
        cells = (
            *(entry["model"], entry["precision"], first["codes"], f"{first['code_steps']:.0f}", f"{first['codes_moved_percent']:.4f}"),
            *(first["floats"], f"{first['float_steps']:.4f}", f"{second['code_steps']:.0f}", f"{second['codes_moved_percent']:.4f}"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model at every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx=SAMPLES")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precisions", default="w8a8,w4a4")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--range-samples", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for entry in args.models:
        model, _, place = entry.partition("=")
        for precision in args.precisions.split(","):
            rows.append(row(Path(model), place, precision, args.target, args.samples, args.range_samples, args.out.parent))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            args.out.write_text(json.dumps(report.finite({"environment": report.environment("cpu"), "rows": rows}), indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
