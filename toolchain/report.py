"""What happened, as JSON-ready data. Every number in the terminal and on the page comes from here."""

import itertools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from . import capacity
from .config import PRESETS, Config
from .config_file import resolved
from .data_config import DataConfig
from .errors import UsageError
from .fit import GridFit, worst
from .islands import island_rows
from .pipeline import Quantized
from .plan import BlockRow, Plan
from .quant_table import BIAS_BITS, QuantTable
from .range_choice import RangeChoice
from .sensitivity import Sensitivity
from .source import SourceModel
from .unit import CurvePoint, UnitResult
from .validation import ValidationReport
from .verdict import intervals, verdict

_PACKAGES = ("mrecg-onnx", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "onnx2torch", "numpy", "matplotlib")
_KEYS = ("model", "config", "blocks", "plan", "units", "oscillation", "worst_values", "sensitivity", "validation", "verdict", "seconds")
_WORST = 6  # values whose histograms are kept, of each kind


def run_report(
    source: SourceModel,
    output: Path,
    config: Config,
    data: DataConfig,
    quantized: Quantized,
    validation: ValidationReport,
    fits: Sequence[GridFit],
    layers: Sensitivity,
    seconds: float,
) -> dict[str, Any]:
    """All facts of a `quantize` run as JSON-ready data; times in seconds, accuracies in percent, ratios in dB, sizes in bytes."""
    return finite(
        {
            "model": {
                "path": str(source.path),
                "sha256": source.sha256,
                "opset": source.opset,
                "output": str(output),
                "notes": [*source.notes, *quantized.notes],
            },
            "config": resolved(config, data),
            "conventions": {
                "target": config.scheme.convention,
                "target_reasons": config.scheme.why,
                "precision": config.precision.convention + _requantized(quantized.table),
                "first_layers": sorted(quantized.placement.first),
                "last_layers": sorted(quantized.placement.last),
                "algorithm": _algorithm(config),
            },
            "environment": {**environment(quantized.device), "processes": quantized.processes},
            "calibration": {
                "samples": quantized.samples,
                "import_error": quantized.import_error,
                "ranges": [range_report(choice) for choice in quantized.ranges],
            },
            **plan_report(quantized.plan),
            "units": [unit_report(result) for result in quantized.results],
            "oscillation": oscillations(quantized),
            "coverage": coverage(source, quantized.table),
            "float_nodes": [asdict(row) for row in quantized.placement.floats],
            "islands": [asdict(row) for row in island_rows(source, [row.block for row in quantized.plan.rows], quantized.islands)],
            "grids": grids(quantized.table, fits),
            "worst_values": [asdict(f) for kind in ("weight", "activation") for f in worst([f for f in fits if f.kind == kind], _WORST)],
            "sensitivity": asdict(layers),
            "validation": {**validation_report(validation), "evaluated_on": data.eval_data or "the calibration samples"},
            "verdict": asdict(verdict(validation, data.max_drop, is_held_out=data.eval_data is not None)),
            "seconds": {**quantized.seconds, "total": round(seconds, 3), "best_preset_estimate": best_estimate(config, quantized)},
            "memory_peak_bytes": peak_memory(),
        }
    )


def range_report(choice: RangeChoice) -> dict[str, Any]:
    """The method of one bit width, and the SQNR in dB of the outputs under each candidate, with these activations alone quantized."""
    sqnr = {name: -10.0 * math.log10(error) if error else None for name, error in choice.errors.items()}
    return {"bits": choice.bits, "method": choice.method.label, "sqnr": sqnr}


def plan_report(plan: Plan) -> dict[str, Any]:
    """Blocks, capacities, gaps and merges."""
    gaps = capacity.gaps([row.capacity for row in plan.rows])
    boundaries = [
        {
            "blocks": [before.block.name, after.block.name],
            "capacity_gap": float(gaps[i]),
            "loss_drop": _drop(before, after),
            "merged": i in plan.merged,
            "reason": plan.reasons[i],
        }
        for i, (before, after) in enumerate(itertools.pairwise(plan.rows))
    ]
    return {
        "blocks": [block_report(row) for row in plan.rows],
        "plan": {"why": plan.why, "units": [unit.name for unit in plan.units], "boundaries": boundaries},
    }


def unit_report(result: UnitResult) -> dict[str, Any]:
    """One unit as JSON-ready data; its curve by columns."""
    row = {spec.name: getattr(result, spec.name) for spec in fields(result) if spec.name not in ("changes", "curve")}
    return row | {"curve": {name: [getattr(point, name) for point in result.curve] for name in CurvePoint._fields}}


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
    """How much of the weighted layers is on integer grids, by layers and by weights, and how much of the weights that are only stored."""
    layers = {node.name: source.graph.weight(node) for node in source.graph.weighted}
    weights = {name for name in layers.values() if name is not None}
    size = sum(source.constants[name].size for name in weights)
    return {
        "layers": len(layers),
        "layers_quantized": sum(name in table for name in layers.values()),
        "weights": size,
        "weights_quantized": sum(source.constants[name].size for name in weights if name in table),
        "stored": sum(source.constants[name].size for name in source.stored),
        "stored_quantized": sum(source.constants[name].size for name in source.stored if name in table),
        "activations_quantized": sum(grid.codes is None and grid.tied_to is None for grid in table.tensors.values()),
    }


def _requantized(table: QuantTable) -> str:
    """The values that layers read on a grid of their own, in words."""
    origins = [copy.origin for copy in table.copies.values() if copy.origin in table]  # others are inputs that are handed out as they came
    if not origins:
        return ""
    kept = sorted({table[origin].spec.bits for origin in origins})
    count = f"{len(origins)} operand{'s' if len(origins) > 1 else ''}"
    return f"; {count} that sums read too kept at {' and '.join(map(str, kept))} bits and requantized for the layers"


def grids(table: QuantTable, fits: Sequence[GridFit] = ()) -> dict[str, Any]:
    """Bits, scales and fit by value name; the scales of per-channel grids as (least, largest)."""
    rows = {}
    fit_of = {fit.name: {"sqnr": fit.sqnr, "clipped": fit.clipped} for fit in fits}
    for name, grid in table.tensors.items():
        if grid.spec.bits == BIAS_BITS:
            continue
        scale = float(grid.scale) if grid.scale.ndim == 0 else [float(grid.scale.min()), float(grid.scale.max())]
        zero_point = int(grid.zero_point) if grid.zero_point.ndim == 0 else None
        kind = "activation" if grid.codes is None else "weight"
        row = {"kind": kind, "bits": grid.spec.bits, "scale": scale, "zero_point": zero_point, "tied_to": grid.tied_to}
        if grid.copy is not None:
            row |= {"copy_of": grid.copy.origin, "readers": list(grid.copy.readers)}
        rows[name] = row | fit_of.get(name, {})
    return rows


def validation_report(validation: ValidationReport) -> dict[str, Any]:
    """A validation with what follows from it, as JSON-ready data."""
    return {
        **asdict(validation),
        "drop": validation.drop,
        "intervals": intervals(validation),
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
    """Write report.json and its page report.html into a folder; returns the page's place.

    Raises:
        UsageError: the folder cannot be written.
    """
    from .page import report_page  # brings matplotlib, which nothing else needs

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}") from error
    write_text(folder / "report.json", as_json(report))
    page = folder / "report.html"
    write_text(page, report_page(report))
    return page


def load_report(path: Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        UsageError: it cannot be read, or is no report of a `quantize` run.
    """
    report = load_json(path)
    missing = [key for key in _KEYS if not isinstance(report, dict) or key not in report]
    if missing:
        raise UsageError(f"{path}: has no {missing[0]!r}: not the report.json of a `quantize` run")
    return report


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON: {error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that no half-written file is ever seen.

    Raises:
        UsageError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def as_json(value: Any) -> str:
    """JSON with one line for each innermost list, which keeps curves and histograms short."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False)
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda found: " ".join(found[0].split()), text) + "\n"


def _algorithm(config: Config) -> str:
    corrected = ", biases corrected" if config.bias_correction else ""
    return {
        "minmax": f"rounding to nearest, min-max ranges{corrected}",
        "mse": f"rounding to nearest, {config.weight_range} weight and {config.activation_range} activation ranges{corrected}",
        "aciq": f"ACIQ-Mix: analytic clipping, bits by channel for weights of up to 4 bits, norms kept{corrected}",
        "lapq": f"LAPQ: all step sizes jointly by Powell's method on the loss of the network{corrected}",
        "adaround": "AdaRound: layer by layer on the quantized stream, activations quantized, steps as calibrated",
        "adaquant": "AdaQuant: layer by layer on the quantized stream, weights, steps and biases learned straight through",
        "bit-split": "Bit-Split: layer by layer on the quantized stream, codes bit by bit, scales in closed form",
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


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
