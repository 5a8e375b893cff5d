"""What happened, as JSON for machines and as a table for the terminal. Every number in the table comes from the JSON."""

import json
import math
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import capacity
from .config import PRESETS, Config, DataConfig, resolved
from .islands import island_rows
from .pipeline import Quantized
from .plan import BlockRow, Plan
from .quant_table import BIAS_BITS, QuantTable
from .source import SourceModel
from .validation import ValidationReport

_PACKAGES = ("mrecg-onnx", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "onnx2torch", "numpy")


def run_report(
    source: SourceModel,
    output: Path,
    config: Config,
    data: DataConfig,
    quantized: Quantized,
    validation: ValidationReport,
    evaluated_on: str,
    seconds: float,
) -> dict[str, Any]:
    """All facts of a `quantize` run as JSON-ready data; times in seconds, accuracies in percent, ratios in dB, sizes in bytes."""
    return finite(
        {
            "model": {"path": str(source.path), "sha256": source.sha256, "opset": source.opset, "output": str(output)},
            "config": resolved(config, data),
            "conventions": {
                "target": config.scheme.convention,
                "target_reasons": config.scheme.why,
                "precision": config.precision.convention,
                "first_layers": sorted(quantized.placement.first),
                "last_layers": sorted(quantized.placement.last),
                "algorithm": _algorithm(config),
            },
            "environment": environment(quantized.device),
            "calibration": {"samples": quantized.samples, "import_error": quantized.import_error},
            **plan_report(quantized.plan),
            "units": [{key: value for key, value in asdict(result).items() if key != "changes"} for result in quantized.results],
            "oscillation": oscillations(quantized),
            "coverage": coverage(source, quantized.table),
            "float_nodes": [asdict(row) for row in quantized.placement.floats],
            "islands": [asdict(row) for row in island_rows(source, [row.block for row in quantized.plan.rows], quantized.islands)],
            "grids": grids(quantized.table),
            "validation": {**validation_report(validation), "evaluated_on": evaluated_on},
            "seconds": {**quantized.seconds, "total": round(seconds, 3), "best_preset_estimate": best_estimate(config, quantized)},
            "memory_peak_bytes": peak_memory(),
        }
    )


def plan_report(plan: Plan) -> dict[str, Any]:
    """Blocks, capacities, gaps and merges."""
    gaps = capacity.gaps([row.capacity for row in plan.rows])
    return {
        "blocks": [block_report(row) for row in plan.rows],
        "plan": {
            "why": plan.why,
            "units": [unit.name for unit in plan.units],
            "merges": [
                {
                    "blocks": [plan.rows[i].block.name, plan.rows[i + 1].block.name],
                    "capacity_gap": float(gaps[i]),
                    "loss_drop": _drop(plan.rows[i], plan.rows[i + 1]),
                }
                for i in sorted(plan.merged)
            ],
        },
    }


def block_report(row: BlockRow) -> dict[str, Any]:
    """One block as JSON-ready data."""
    block = row.block
    return {
        "name": block.name,
        "first_node": block.nodes[0].name,
        "last_node": block.nodes[-1].name,
        "operators": [node.op_type for node in block.nodes],
        "inputs": list(block.inputs),
        "outputs": list(block.outputs),
        "layers": list(block.weighted),
        "weights": sum(size for size, _ in row.traits.layers),
        "is_residual": block.is_residual,
        "is_island": block.is_island,
        "opens_stage": row.traits.is_transition,
        "capacity": row.capacity,
        "loss": row.loss,
        "loss_normalised": row.loss / row.energy if row.loss is not None and row.energy else None,
    }


def oscillations(quantized: Quantized) -> dict[str, float | None]:
    """Sums of the positive drops of the loss: over the calibrated blocks, over the units before, and after reconstruction."""
    losses = [row.loss for row in quantized.plan.rows if row.loss is not None]
    return {
        "blocks_calibrated": capacity.oscillation(losses) if losses else None,
        "units_before": capacity.oscillation([r.loss_before for r in quantized.results]) if quantized.results else None,
        "units_after": capacity.oscillation([min(r.loss_before, r.loss_after) for r in quantized.results]) if quantized.results else None,
    }


def coverage(source: SourceModel, table: QuantTable) -> dict[str, Any]:
    """How much of the weighted layers is on integer grids, by layers and by weights."""
    layers = {node.name: source.graph.weight(node) for node in source.graph.weighted}
    weights = {name for name in layers.values() if name is not None}
    size = sum(source.constants[name].size for name in weights)
    return {
        "layers": len(layers),
        "layers_quantized": sum(name in table for name in layers.values()),
        "weights": size,
        "weights_quantized": sum(source.constants[name].size for name in weights if name in table),
        "activations_quantized": sum(grid.codes is None and grid.tied_to is None for grid in table.tensors.values()),
    }


def grids(table: QuantTable) -> dict[str, Any]:
    """Bits and scales by value name; the scales of per-channel grids as (least, largest)."""
    rows = {}
    for name, grid in table.tensors.items():
        if grid.spec.bits == BIAS_BITS:
            continue
        scale = float(grid.scale) if grid.scale.ndim == 0 else [float(grid.scale.min()), float(grid.scale.max())]
        zero_point = int(grid.zero_point) if grid.zero_point.ndim == 0 else None
        kind = "activation" if grid.codes is None else "weight"
        rows[name] = {"kind": kind, "bits": grid.spec.bits, "scale": scale, "zero_point": zero_point, "tied_to": grid.tied_to}
    return rows


def validation_report(validation: ValidationReport) -> dict[str, Any]:
    """A validation with what follows from it, as JSON-ready data."""
    return {
        **asdict(validation),
        "drop": validation.drop,
        "integer_operators": validation.integer_operators,
        "float_layers": validation.float_layers,
    }


def best_estimate(config: Config, quantized: Quantized) -> float | None:
    """Seconds that the reconstruction would take with the `best` preset, from the speed of this run."""
    if not quantized.results:
        return None
    return round(sum(result.seconds / result.iterations for result in quantized.results) * PRESETS["best"], 1)


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": gpu,
    }


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json into a folder, beside and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "report.json", folder / ".report.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def quantize_summary(report: dict[str, Any]) -> Group:
    """The closing table of a `quantize` run."""
    cover, seconds, config = report["coverage"], report["seconds"], report["config"]
    lines: list[Any] = [validation_table(report["validation"])]
    share = 100 * cover["weights_quantized"] / max(cover["weights"], 1)
    facts = [
        ("weights on integer grids", f"{share:.1f} % of {cover['weights']:,} ({cover['layers_quantized']} of {cover['layers']} layers)"),
        ("target", report["conventions"]["target"]),
        ("convention", report["conventions"]["precision"]),
    ]
    if report["units"]:
        improved = [u for u in report["units"] if u["kept"] == "learned"]
        worse = [u["unit"] for u in report["units"] if u["kept"] != "learned"]
        before, after = (report["oscillation"][key] for key in ("blocks_calibrated", "units_after"))
        merges = ", ".join(name for name in report["plan"]["units"] if "+" in name) or "none"
        facts += [
            ("units", f"{len(report['plan']['units'])} of {len(report['blocks'])} blocks; joined: {merges}"),
            ("reconstruction", f"{len(improved)} of {len(report['units'])} units improved, {seconds['reconstruct']:.0f} s"),
            ("oscillation of the loss", f"{before:.4g} calibrated, {after:.4g} reconstructed"),
        ]
        if worse:
            facts.append(("kept as calibrated", f"{', '.join(worse)} (reconstruction ended with a larger loss)"))
        if config["preset"] != "best" or "iterations" in config:
            facts.append(("--preset best", f"would reconstruct for about {_duration(seconds['best_preset_estimate'])} here"))
    for line in island_lines(report["islands"]):
        facts.append(("float island", line))
    for row in report["float_nodes"]:
        facts.append(("stays float", f"{row['op_type']} {row['node']}: {row['reason']}"))
    table = Table.grid(padding=(0, 2))
    for key, value in facts:
        table.add_row(Text(key, style="dim"), escape(value))
    lines.append(table)
    return Group(*lines)


def unit_table(report: dict[str, Any]) -> Table:
    """One line for each unit: losses before and after, what was kept."""
    table = _table("Units", "unit", "loss before>", "after>", "kept", "flipped>", "seconds>")
    for unit in report["units"]:
        flipped, seconds = f"{100 * unit['flipped']:.1f} %", f"{unit['seconds']:.1f}"
        table.add_row(unit["unit"], f"{unit['loss_before']:.4g}", f"{unit['loss_after']:.4g}", unit["kept"], flipped, seconds)
    return table


def block_table(plan: dict[str, Any]) -> Table:
    """One line for each block: what it is, its capacity, and the unit it is reconstructed in when that is larger."""
    table = _table("Blocks", "block", "unit", "kind", "opens", "layers>", "weights>", "ModCap>", "last node")
    unit_of = {part: unit for unit in plan["plan"]["units"] for part in unit.split("+")}
    for block in plan["blocks"]:
        unit = unit_of[block["name"]]
        table.add_row(
            block["name"],
            unit if "+" in unit else "",
            _kind(block),
            "stage" if block["opens_stage"] and block["layers"] else "",
            str(len(block["layers"])),
            f"{block['weights']:,}",
            f"{block['capacity']:.3g}",
            escape("/".join(block["last_node"].split("/")[-2:])),
        )
    return table


def validation_table(v: dict[str, Any]) -> Table:
    """Float beside quantized, as ONNX Runtime executes them."""
    table = _table(f"{v['provider']}, {v['samples']} samples of {v['evaluated_on']}", "", "float>", "quantized>", ">")
    for key in ("top1", "top5"):
        if v[f"{key}_float"] is not None:
            a, b = v[f"{key}_float"], v[f"{key}_quantized"]
            table.add_row(f"{key[:3]}-{key[3]} accuracy", f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f} points")
    if v["agreement"] is not None:
        table.add_row("same prediction as float", "", f"{v['agreement']:.2f} %", "")
    for name, value in v["sqnr"].items():
        table.add_row(f"SQNR of {escape(name)}", "", f"{value:.2f} dB" if value is not None else "exact", "")
    table.add_row("file", _size(v["float_bytes"]), _size(v["quantized_bytes"]), f"{v['float_bytes'] / v['quantized_bytes']:.2f}x smaller")
    latency = v["latency"]
    ratio = latency["float_ms"] / latency["quantized_ms"]
    speed = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    table.add_row(f"latency, batch {latency['batch']}", f"{latency['float_ms']:.2f} ms", f"{latency['quantized_ms']:.2f} ms", speed)
    floats = ", ".join(f"{count} {kind}" for kind, count in v["float_layers"].items()) or "no layer in float"
    table.add_row("integer kernels", "", str(v["integer_operators"]), floats)
    arithmetic = v["integer_arithmetic"]
    table.add_row("each kernel = float", "", f"within {arithmetic['steps']:.0f} step", f"{arithmetic['share']:.2g} % of codes differ")
    if v["simulated_arithmetic"] is not None:
        s = v["simulated_arithmetic"]
        table.add_row("file = simulation", "", f"within {s['steps']:.0f} step", f"{s['values']} values, {s['share']:.2g} % of codes differ")
    if v["simulation"] is not None:
        s = v["simulation"]
        agrees = f"{s['agreement']:.2f} %" if s["agreement"] is not None else f"{s['sqnr']:.1f} dB" if s["sqnr"] is not None else "exact"
        table.add_row("ONNX Runtime = simulation", "", agrees, f"{s['sqnr']:.1f} dB" if s["sqnr"] is not None else "exact")
    return table


def _table(title: str, *columns: str) -> Table:
    """A plain table; a column whose name ends in > is aligned to the right, and the last one gives way on narrow terminals."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_last = column is columns[-1]
        justify = "right" if column.endswith(">") else "left"
        table.add_column(column.removesuffix(">"), justify=justify, no_wrap=not is_last, overflow="ellipsis")
    return table


def _kind(block: dict[str, Any]) -> str:
    if block["is_island"]:
        return "float island"
    return "residual" if block["is_residual"] else "chain" if block["layers"] else "no weights"


def island_lines(islands: list[dict[str, Any]]) -> list[str]:
    """One line for each reason why nodes are left to ONNX Runtime."""
    why: dict[str, list[dict[str, Any]]] = {}
    for island in islands:
        why.setdefault("; ".join(island["reasons"]), []).append(island)
    lines = []
    for reason, rows in why.items():
        count, weights = sum(len(row["nodes"]) for row in rows), sum(row["weights"] for row in rows)
        held = f", with {weights:,} weights" if weights else ""
        lines.append(f"{count} {'node' if count == 1 else 'nodes'}{held}: {reason} ({', '.join(row['block'] for row in rows)})")
    return lines


def _algorithm(config: Config) -> str:
    return {
        "minmax": "rounding to nearest, min-max ranges",
        "mse": f"rounding to nearest, {config.weight_range} weight and {config.activation_range} activation ranges",
        "adaround": "AdaRound: layer by layer on the quantized stream, activations quantized, steps as calibrated",
        "brecq": "BRECQ as in MQBench: unit by unit, activations quantized while learning, steps learned jointly",
        "qdrop": "QDrop: as BRECQ, with activations quantized at random, element by element",
    }[config.algorithm]


def _drop(before: BlockRow, after: BlockRow) -> float | None:
    return before.loss - after.loss if before.loss is not None and after.loss is not None else None


def finite(value: Any) -> Any:
    """JSON has no inf or nan."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
