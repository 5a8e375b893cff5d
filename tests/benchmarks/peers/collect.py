"""Set peers' runs beside this project's on the same model, data, bits and convention; every figure from one evaluation set.

usage: python -m tests.benchmarks.peers.collect OURS.json --runs FOLDER --models FOLDER --eval-data FOLDER --out PEERS.json

OURS.json: results of `tests.benchmarks.accuracy` (repeatable). `--runs` holds one OUT_DIR of the peers' runners for each run; `--models`
and `--eval-data` hold NAME.onnx and NAME_evaluation.npz. A peer that exports is scored on its file, else on its own simulation, and the
table says which. Prints a Markdown table; rows of the same model, precision and convention stand together.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = "mrecg-onnx"


def ours(path: Path) -> list[dict[str, Any]]:
    """The rows of MRECG on QDrop, this project's default method."""
    results = json.loads(path.read_text())
    return [
        {
            "model": row["model"],
            "precision": row["precision"],
            "first_last": row["first_last"],
            "tool": OURS,
            "scored": "file",
            "loads": True,
            "top1_float": row["top1_float"],
            "top1": row["top1"],
            "agreement": row["agreement"],
            "sqnr_db": row["sqnr"],
            "cpu_seconds": row["cpu_seconds"],
            "iterations": row["iterations"],
            "samples": row["calibration_samples"],
            "seed": row["seed"],
            "threads": row["threads"],
        }
        for row in results["rows"]
        if row["method"] == "mrecg+qdrop" and row["precision"] in ("w4a4", "w4a8")
    ]


def peer(folder: Path, models: Path, data: Path) -> dict[str, Any]:
    """One run of a peer, scored."""
    run = json.loads((folder / "result.json").read_text())
    name = Path(run["model"]).stem
    command = [sys.executable, str(Path(__file__).with_name("score.py")), str(models / run["model"])]
    command += ["--eval", str(data / f"{name}_evaluation.npz"), "--logits", str(folder / "logits.npz")]
    if run["export_ok"]:
        command += ["--quantized", str(folder / "quantized.onnx")]
    score = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    loads = bool(score.get("file", {}).get("loads"))
    return {
        "model": name,
        "precision": f"w{run['weight_bits']}a{run['activation_bits']}",
        "first_last": run["first_last"],
        "tool": f"{run['tool']} {run['version']}",
        "scored": "file" if loads else "simulation",
        "loads": loads,
        "top1_float": score["top1_float"],
        **score["file" if loads else "simulation"],
        "simulation": score["simulation"],
        **{key: run[key] for key in ("cpu_seconds", "iterations", "samples", "seed", "threads", "batch_size", "weight_scheme")},
        **{key: run[key] for key in ("activation_grid", "placement", "reused") if key in run},
        "export_error": run["export_error"] and run["export_error"].strip().splitlines()[-1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| model | precision | first/last | tool | top-1 | drop | agreement | SQNR dB | CPU s | loads in ORT |", "|" + "---|" * 10]
    for row in rows:
        state = "yes" if row["loads"] else "no; its simulation scored"
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['first_last']} | {row['tool']} | {row['top1']:.2f} | "
            f"{row['top1_float'] - row['top1']:+.2f} | {row['agreement']:.2f} | {row['sqnr_db']:.2f} | {row['cpu_seconds']:.0f} | {state} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Score, sort, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path, nargs="+")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for path in args.ours for row in ours(path)]
    rows += [peer(path.parent, args.models, args.eval_data) for path in sorted(args.runs.glob("*/result.json"))]
    rows.sort(key=lambda row: (row["model"], row["precision"], row["first_last"], row["tool"] != OURS, row["tool"]))
    args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
