"""Architectures at W8A8 beside ONNX Runtime's own `quantize_static`: does each complete, with which noise, and how fast is the file?

usage: python -m tests.benchmarks.families FOLDER --out RESULTS.json [--only TEXT] [--limit 1800] [--seconds 4]

FOLDER has models of images, such as `peers/timm_models.py` writes. Each is quantized by the command line (`-p w8a8 --algorithm mse`) in a
process of its own, and by `quantize_static` (QDQ, uint8 activations, int8 weights by channel, after `quant_pre_process`), on the same 8
samples: noise with large and small patterns, seed 0. SQNR is on these samples, of the worst output. Times are the fewest milliseconds of
all rounds, one thread, all files in turn. Rows that RESULTS.json has are not run again; those of models that fail say why. Prints a table.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference

from tests.benchmarks.latency import fastest, opened
from toolchain import report, runtime
from toolchain.noise import sqnr

SAMPLES, PATCH = 8, 16


class Reader(CalibrationDataReader):
    """The samples one by one, as `quantize_static` asks for them."""

    def __init__(self, feeds: dict[str, np.ndarray], batch: int) -> None:
        self._rows = iter([{name: array[i : i + batch] for name, array in feeds.items()} for i in range(0, SAMPLES, batch)])

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self._rows, {})


def samples(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Noise for every input; of images half of it in patches."""
    rng, found = np.random.default_rng(0), {}
    for entry in session.get_inputs():
        shape = [SAMPLES, *(size if isinstance(size, int) else PATCH for size in entry.shape[1:])]
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 4 and shape[2] % PATCH == shape[3] % PATCH == 0:
            patches = rng.normal(size=(*shape[:2], shape[2] // PATCH, shape[3] // PATCH)).astype(np.float32)
            noise = 0.5 * noise + np.kron(patches, np.ones((1, 1, PATCH, PATCH), np.float32))
        found[entry.name] = noise
    return found


def measure(model: Path, limit: float, seconds: float) -> dict[str, Any]:
    """One row: what both files do, and what went wrong."""
    plain = opened(model, 1)
    feeds = samples(plain)
    batch = runtime.fixed_batch(plain, feeds) or 1
    reference = runtime.run(plain, feeds)
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data, ours, theirs = (Path(folder) / name for name in ("data.npz", "ours.onnx", "static.onnx"))
        np.savez(data, **feeds)  # pyright: ignore[reportArgumentType]
        command = [
            sys.executable,
            "-m",
            "toolchain",
            "quantize",
            str(model),
            "-p",
            "w8a8",
            "--algorithm",
            "mse",
            "--no-sensitivity",
            "--json",
        ]
        command += ["--calibration-data", str(data), "--eval-data", str(data), "-o", str(ours)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        if run.returncode:
            row["error"] = run.stderr.strip().splitlines()[-1][:300].replace(str(model.parent), "").replace(folder, "")
        else:
            checked = json.loads(run.stdout)["validation"]
            row |= {"layers_in_float": checked["float_layers"], "integer_kernels": checked["integer_operators"]}
        try:
            source = str(Path(folder) / "prepared.onnx")
            try:
                shape_inference.quant_pre_process(str(model), source)
            except Exception:  # its symbolic shape inference fails on some
                source = str(model)
            options: dict[str, Any] = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(source, str(theirs), Reader(feeds, batch), quant_format=QuantFormat.QDQ, **options)
            opened(theirs, 1)
        except Exception as error:  # whatever it raises
            row["static_error"] = str(error).splitlines()[0][:200].replace(str(model.parent), "").replace(folder, "")
            theirs.unlink(missing_ok=True)
        files = {name: path for name, path in (("float", model), ("ours", ours), ("static", theirs)) if path.exists()}
        sessions = {name: [opened(path, 1)] for name, path in files.items()}
        row["ms"] = fastest(sessions, {name: array[:batch] for name, array in feeds.items()}, seconds)
        for name, (session,) in sessions.items():
            if name != "float":
                made = runtime.run(session, feeds)
                row[f"{name}_sqnr"] = min(sqnr(reference[key], made[key]) for key in reference)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line for each model."""
    lines = ["| model | SQNR dB | quantize_static | float ms | ours | quantize_static | layers in float |", "|---|---|---|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | |")
            continue
        ratios = [f"{row[key]:.1f}" if row.get(key) is not None else "-" for key in ("ours_sqnr", "static_sqnr")]
        times = [f"{row['ms'][key]:.1f}" if key in row["ms"] else "fails" for key in ("float", "ours", "static")]
        floats = ", ".join(f"{count} {kind}" for kind, count in row["layers_in_float"].items())
        lines.append(f"| {' | '.join([name, *ratios, *times, floats])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=1800)
    parser.add_argument("--seconds", type=float, default=4)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for model in sorted(options.folder.glob("*.onnx")):
        if model.stem in rows or options.only not in model.stem:
            continue
        try:
            rows[model.stem] = measure(model, options.limit, options.seconds)
        except subprocess.TimeoutExpired:
            rows[model.stem] = {"error": f"more than {options.limit:g} s"}
        options.out.write_text(report.as_json(rows), encoding="utf-8")
        print(model.stem, rows[model.stem], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
