"""Time one learning step of a block here and in the peers: the same block, samples, batch and iterations, one thread each.

usage: python -m tests.benchmarks.peer_steps --aimet AIMET/bin/python --esp-ppq PPQ/bin/python --out RESULTS.json [--blocks basic,...]

The peers run in environments of their own (`peers/README.md`), ours in this process before and after them. Processor seconds of the
optimisation alone at two numbers of iterations; a step is their difference, so that what is done once cancels. AIMET learns layer by
layer, so that its step is one of each layer, with activations in float; ESP-PPQ learns weights and steps of the block, without dropping.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import step
from toolchain import report
from toolchain.activations import unpacked
from toolchain.cpu import keep_freed_memory

PEERS = Path(__file__).parent / "peers"


def peer(python: Path, script: str, folder: Path, batch: int, iterations: int) -> float:
    """Processor seconds of a peer's optimisation."""
    out = folder / f"{script}_{iterations}"
    arguments = ["--calibration", str(folder / "calibration.npz"), "--samples", str(step.CACHED), "--weight-bits", "4"]
    arguments += [
        "--activation-bits",
        "4",
        "--iterations",
        str(iterations),
        "--batch-size",
        str(batch),
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(python), str(PEERS / script), str(folder / "block.onnx"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if not (out / "result.json").exists():
        raise SystemExit(done.stderr[-2000:])
    return json.loads((out / "result.json").read_text())["optimisation_cpu_seconds"]


def ours(design: step.Design, folder: Path, batch: int, iterations: int) -> float:
    """Processor seconds of this project's learning loop."""
    step.ours(step.setting(design, folder, batch, 2), True)()  # warms up, as a peer's process does in either of its runs
    run = step.ours(step.setting(design, folder, batch, iterations), True)
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Time, add to the results file, print a Markdown table."""
    parser = step.arguments(__doc__, iterations=40)
    parser.add_argument("--aimet", type=Path, required=True)
    parser.add_argument("--esp-ppq", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = report.environment("cpu")
    few = args.iterations // 4
    for name in args.blocks.split(","):
        with tempfile.TemporaryDirectory() as place:
            folder, design = Path(place), step.DESIGNS[name]
            inputs = unpacked(step.setting(design, folder, args.batch, 1).unit.float_inputs["x"])
            assert isinstance(inputs, torch.Tensor)
            np.savez(folder / "calibration.npz", x=inputs.contiguous().numpy())
            steps: dict[str, list[float]] = {"ours": [], "aimet": [], "esp-ppq": []}
            for turn in ("ours", "aimet", "esp-ppq", "ours"):
                if turn == "ours":
                    times = [ours(design, folder, args.batch, count) for count in (few, args.iterations)]
                else:
                    python, script = {"aimet": (args.aimet, "aimet_adaround.py"), "esp-ppq": (args.esp_ppq, "esp_ppq_lsq.py")}[turn]
                    times = [peer(python, script, folder, args.batch, count) for count in (few, args.iterations)]
                steps[turn].append((times[1] - times[0]) / (args.iterations - few) * 1e3)
        ms = {turn: round(statistics.mean(values), 2) for turn, values in steps.items()}
        row = {"block": name, "batch": args.batch, "milliseconds": ms, "ours_twice": [round(value, 2) for value in steps["ours"]]}
        results["rows"] = [old for old in results["rows"] if (old["block"], old["batch"]) != (name, args.batch)] + [row]
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("| block | batch | ours ms | AIMET AdaRound ms | ESP-PPQ LSQ ms | AIMET / ours | ESP-PPQ / ours |\n|" + "---|" * 7)
    for row in results["rows"]:
        ms = row["milliseconds"]
        ratios = [ms[turn] / ms["ours"] for turn in ("aimet", "esp-ppq")]
        figures = " | ".join(f"{value:.2f}" for value in (ms["ours"], ms["aimet"], ms["esp-ppq"], *ratios))
        print(f"| {row['block']} | {row['batch']} | {figures} |")


if __name__ == "__main__":
    main()
