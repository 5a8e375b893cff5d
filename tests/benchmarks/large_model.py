"""The memory that a model beyond protobuf's 2 GB takes, stage by stage, as multiples of the model.

usage: python -m tests.benchmarks.large_model --scratch FOLDER [--layers 36] [--width 4096] [--out tests/benchmarks/results/large_model]

Makes a perceptron of random weights with external data (36 layers of 4096 x 4096: 2.4 GB), quantizes it at W8A8 (`minmax`, 8 samples) in
this process, writes the result and runs it in ONNX Runtime. `anonymous` is memory that only this process can free; `mapped` are pages of
files, which the system drops when it needs room. Both without what the program itself takes before it loads the model. Writes OUT.json and
OUT.md.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper


def build(folder: Path, layers: int, width: int) -> Path:
    """The model, its weights written layer by layer."""
    rng, path = np.random.default_rng(0), folder / "large.onnx"
    nodes, tensors, x = [], [], "x"
    with (folder / "large.weights").open("wb") as file:
        for i in range(layers):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL)
            place = {"location": "large.weights", "offset": file.tell(), "length": 4 * width * width}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            for _ in range(0, width, 256):
                file.write((rng.standard_normal((256, width), dtype=np.float32) / np.float32(np.sqrt(width))).tobytes())
            tensors.append(tensor)
            nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"h{i}"], f"n{i}"), helper.make_node("Tanh", [f"h{i}"], [f"t{i}"], f"a{i}")]
            x = f"t{i}"
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])] for name in ("x", x))
    graph = helper.make_graph(nodes, "large", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Watch:
    """The largest resident sizes since the last lap."""

    def __init__(self, size: int) -> None:
        self._size, self._peak, self.rows = size, {"anonymous": 0, "mapped": 0}, list[dict[str, Any]]()
        self._base, self._since = self._now(), time.perf_counter()
        threading.Thread(target=self._run, daemon=True).start()

    def lap(self, stage: str) -> None:
        peak = {key: max(self._peak[key], value) for key, value in self._now().items()}
        shares = {key: round((value - self._base[key]) / self._size, 2) for key, value in peak.items()}
        self.rows.append({"stage": stage, "seconds": round(time.perf_counter() - self._since, 1), **shares})
        print(self.rows[-1], flush=True)
        self._since, self._peak = time.perf_counter(), self._now()

    def _run(self) -> None:
        while True:
            self._peak = {key: max(self._peak[key], value) for key, value in self._now().items()}
            time.sleep(0.02)

    @staticmethod
    def _now() -> dict[str, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {key: int(lines[name].split()[0]) * 1024 for key, name in (("anonymous", "RssAnon"), ("mapped", "RssFile"))}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large_model")
    args = parser.parse_args()

    import torch

    from exporters import export_qdq, write_model
    from toolchain import large, runtime
    from toolchain.config import Config
    from toolchain.noise import sqnr
    from toolchain.pipeline import quantize
    from toolchain.report import environment
    from toolchain.samples import Samples
    from toolchain.source import load_source

    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True, exist_ok=True)
    path, output = build(args.scratch, args.layers, args.width), args.scratch / "quantized.onnx"
    size = large.file_bytes(path)
    samples = Samples({"x": np.random.default_rng(1).standard_normal((8, args.width)).astype(np.float32)})
    watch = Watch(size)
    source = load_source(path)
    watch.lap("load")
    found = quantize(source, samples, Config(device="cpu", algorithm="minmax", weight_bits=8, activation_bits=8))
    watch.lap("quantize")
    exported = export_qdq(source.model, found.table)
    watch.lap("export")
    write_model(exported, output)
    watch.lap("write")
    del exported, found
    floats, results = (runtime.run(runtime.session(model), samples.inputs) for model in (source.model, output))
    watch.lap("run both in ONNX Runtime")
    ratio = min(sqnr(floats[name], results[name]) for name in floats)
    hardware = f"{environment('cpu')['processor']}, 1 thread"
    facts = {"float_bytes": size, "quantized_bytes": large.file_bytes(output), "sqnr": round(ratio, 1), "stages": watch.rows}
    args.out.with_suffix(".json").write_text(json.dumps(facts | {"hardware": hardware}, indent=1) + "\n")
    rows = [f"| {r['stage']} | {r['seconds']} | {r['anonymous']:.2f} | {r['mapped']:.2f} |" for r in watch.rows]
    lines = [
        "# A model beyond 2 GB",
        "",
        f"{args.layers} MatMul of {args.width} x {args.width}, {size / 1e9:.2f} GB of float weights as external data; W8A8 `minmax`, 8",
        f"samples. The result has {facts['quantized_bytes'] / 1e9:.2f} GB and {ratio:.1f} dB SQNR. Peak memory of each stage in multiples",
        "of the model, without what the program takes before: `anonymous` is what only the process can free, `mapped` are pages of files,",
        "counted once for each mapping, which the system drops when it needs room.",
        "",
        "| stage | seconds | anonymous | mapped |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Made by `python -m tests.benchmarks.large_model`; {hardware}",
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
