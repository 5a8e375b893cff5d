"""Several configurations on one model and equal data, each measured from its exported file, in one resumable JSON file.

Equal means: the same model, calibration and evaluation samples, batch, iterations for each unit, target, seeds; rows differ in algorithm,
units, precision and seed alone. What cannot be equal is shown instead: the seconds, and the units (a method that goes layer by layer has
more of them, hence more iterations in all). Every row is measured under ONNX Runtime from the file that `quantize` would have written.

Two uncertainties are kept apart. The spread over seeds (sample standard deviation) says how far another seed would end; the interval of
"behind the best" comes from the samples that two methods judge differently, and says how far other samples would.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import report
from .config import ALGORITHMS, BATCH, PRESETS, UNITS, Config
from .config_file import parse_precision, resolved
from .data_config import DataConfig
from .device import pick_device
from .errors import UsageError
from .intervals import paired_difference
from .outcomes import differing
from .pipeline import Export, quantize
from .progress import Progress
from .samples import Samples
from .simulation import simulate
from .source import SourceModel
from .validation import ValidationReport, float_outputs, validate

METHODS = "mse,adaround,brecq,qdrop,mrecg+brecq,mrecg+qdrop"
_ZEROQ = "zeroq+"  # before a method: it sees distilled samples alone


@dataclass(frozen=True)
class Job:
    """One row to be: `label` names its method in tables, `group` the question it belongs to."""

    label: str
    config: Config
    group: str = ""

    @property
    def is_data_free(self) -> bool:
        """Whether it calibrates on samples distilled from the model instead of those given."""
        return self.label.startswith(_ZEROQ)


@dataclass(frozen=True)
class Distilled:
    """Calibration samples made from the model alone, for data-free jobs.

    `settings` is what decides them beside the model and the seed, and `make` distils those of a seed, telling how it proceeds.
    """

    settings: str
    make: Callable[[int, Progress], Samples]


def method(text: str, base: Config) -> Config:
    """`brecq`: every block alone; `mrecg+brecq`: units by loss; `mrecg:modcap+brecq`: units by another metric; `zeroq+` before any of them
    leaves them as they are.

    Raises:
        UsageError: an unknown algorithm or metric.
    """
    prefix, _, algorithm = text.removeprefix(_ZEROQ).rpartition("+")
    name, _, units = prefix.partition(":")
    units = units or ("loss" if prefix else "none")
    joins = algorithm in ("brecq", "qdrop")
    if algorithm not in ALGORITHMS or name not in ("", "mrecg") or units not in UNITS or units == "manual" or (prefix and not joins):
        raise UsageError(
            f"method {text!r}: expected one of {', '.join(ALGORITHMS)}, or mrecg+brecq, mrecg+qdrop, mrecg:UNITS+qdrop with UNITS one of "
            f"{', '.join(u for u in UNITS if u != 'manual')}; zeroq+ before any of them"
        )
    return dataclasses.replace(base, algorithm=algorithm, units=units)


def jobs(methods: Sequence[str], precisions: Sequence[str], seeds: Sequence[int], base: Config) -> list[Job]:
    """Every method at every precision with every seed; all other settings are those of `base`."""
    return [
        Job(text, dataclasses.replace(method(text, base), **parse_precision(precision), seed=seed))
        for precision in precisions
        for text in methods
        for seed in seeds
    ]


def run_jobs(
    source: SourceModel,
    calibration: Samples,
    distilled: Distilled,
    evaluation: Samples,
    todo: Sequence[Job],
    export: Export,
    place: Path,
    progress: Progress = lambda *_: None,
    note: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run what the file lacks, writing it after each row; returns its facts with the rows of these jobs alone.

    Args:
        source: the float model.
        calibration: calibration samples.
        distilled: those of data-free jobs, made once for each seed when a row needs them.
        evaluation: samples to measure on.
        todo: the configurations.
        export: writes a model.
        place: the JSON file; rows that it has for the same model, data, settings and versions are not run again.
        progress: called as the work proceeds.
        note: called with each new row.

    Raises:
        UsageError: the file is something else, or cannot be written.
    """
    stored = load_results(place) if place.exists() else {"rows": []}
    environment = report.environment(str(pick_device(todo[0].config.device)))
    common = {
        "sha256": source.sha256,
        "evaluation": _digest(evaluation),
        "version": environment["versions"].get("mrecg-onnx"),
    }
    digest, made, reference = _digest(calibration), dict[int, Samples](), dict[str, np.ndarray]()
    rows = {_key(row): row for row in stored["rows"] if "outcomes" in row}  # older ones lack what verdicts need: they are run again
    keys = []
    for index, job in enumerate(todo):
        data = f"zeroq {distilled.settings}" if job.is_data_free else digest
        head = {**common, "calibration": data, "settings": report.finite(_settings(job.config))}
        keys.append((_key(head), job))
        if keys[-1][0] in rows:
            continue
        text = f"{index + 1}/{len(todo)}: {job.label} {job.config.label} seed {job.config.seed}"

        def shown(what: str, done: int, total: int, loss: float, index: int = index, text: str = text) -> None:
            step = done / max(total, 1) if what.startswith("recon") else 0.0
            progress(f"run {text}", round(1000 * (index + step)), 1000 * len(todo), loss)

        reference = reference or float_outputs(source.model, evaluation, job.config.device)
        samples = calibration
        if job.is_data_free:
            made[job.config.seed] = samples = made.get(job.config.seed) or distilled.make(job.config.seed, shown)
        row = head | measured(source, samples, evaluation, job.config, export, shown, reference) | {"note": samples.note}
        rows[keys[-1][0]] = report.finite(row)
        stored |= {"model": str(source.path), "environment": environment, "rows": list(rows.values())}
        report.write_text(place, report.as_json(stored))
        note(rows[keys[-1][0]] | {"label": job.label})
    chosen = [rows[key] | {"label": job.label, "group": job.group} for key, job in keys]
    return {"model": str(source.path), "environment": environment, "rows": chosen}


def measured(
    source: SourceModel,
    calibration: Samples,
    evaluation: Samples,
    config: Config,
    export: Export,
    progress: Progress = lambda *_: None,
    reference: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Run one configuration and measure the exported file; `reference` are the float model's outputs where they are known."""
    started, processor = time.perf_counter(), _processor_seconds()
    found = quantize(source, calibration, config, progress)
    seconds, used = time.perf_counter() - started, _processor_seconds() - processor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        export(found.table, config, path)
        simulated = simulate(source, found.table, evaluation, pick_device(config.device), found.islands, config.scheme)
        checked = validate(
            source.model,
            path,
            evaluation,
            source.path.stat().st_size,
            config.device,
            simulated,
            reference=reference,
            as_written=False,
            elsewhere=config.scheme.elsewhere,
        )
    return {
        "precision": f"w{config.weight_bits}a{config.activation_bits}",
        "seed": config.seed,
        **row_of(checked),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "calibration_samples": found.samples,
        "units": [unit.name for unit in found.plan.units],
        "blocks": [row.block.name for row in found.plan.rows],
        "block_losses": [row.loss for row in found.plan.rows],
        "block_layers": [list(row.traits.layers) for row in found.plan.rows],
        "block_opens": [row.traits.is_transition for row in found.plan.rows],
        "learned_units": [r.unit for r in found.results],
        "unit_losses": [[r.loss_before, r.loss_after] for r in found.results],
        "kept_initial": [r.unit for r in found.results if r.kept == "initial"],
        **report.oscillations(found),
    }


def row_of(checked: ValidationReport) -> dict[str, Any]:
    """The figures of a validation that tables show."""
    simulation = checked.simulation
    return {
        "top1_float": checked.top1_float,
        "top1": checked.top1_quantized,
        "top1_simulated": checked.top1_simulated,
        "lost": checked.lost,
        "won": checked.won,
        "outcomes": checked.outcomes,
        "agreement": checked.agreement,
        "sqnr": checked.worst[1] if checked.worst is not None else float("nan"),
        "simulation_agreement": simulation.agreement if simulation else None,
        "integer_operators": checked.integer_operators,
        "float_layers": checked.float_layers,
        "samples": checked.samples,
        "provider": checked.provider,
    }


def load_results(place: Path) -> dict[str, Any]:
    """The facts of a results file: its rows, and what `compare` (`comparison`) and `study` (`study`) said of them.

    Raises:
        UsageError: it is something else, or cannot be read.
    """
    facts = report.load_json(place)
    if not are_results(facts):
        raise UsageError(f"{place}: exists, but is not the result of a comparison; choose another --output")
    return facts


def are_results(facts: Any) -> bool:
    """Whether a JSON file's content is what `compare` and `study` write."""
    rows = facts.get("rows") if isinstance(facts, dict) else None
    return isinstance(rows, list) and all(isinstance(row, dict) and "settings" in row for row in rows)


def concluded(place: Path, **said: Any) -> dict[str, Any]:
    """Add what was concluded to a results file, so that its page can be drawn again from it alone; returns all its facts."""
    facts = load_results(place) | report.finite(said)
    report.write_text(place, report.as_json(facts))
    return facts


def common_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows of one experiment share."""
    free = [row for row in rows if row["label"].startswith(_ZEROQ)]
    given = [row for row in rows if row not in free] or rows
    first = given[0]
    shared = {key: first[key] for key in ("top1_float", "samples", "calibration_samples", "provider")}
    notes = [note for note in dict.fromkeys(row.get("note") for row in given) if note]
    if free and given is not rows:
        names = ", ".join(dict.fromkeys(row["label"] for row in free))
        notes.append(f"{names}: {free[0]['calibration_samples']:,} samples distilled from BatchNorm statistics alone, no real ones")
    iterations = first["settings"].get("iterations", PRESETS[first["settings"]["preset"]])
    return shared | {"runs": len(rows), "iterations": iterations, "batch_size": first["settings"].get("batch-size", BATCH), "notes": notes}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds, by precision and method, in the order they were asked for.

    `behind` is how many points of top-1 (of agreement without labels) a method is behind the best one of its precision, and `behind_margin`
    half the 95 % interval of that, from the samples that the two judge differently seed by seed; more seeds do not narrow it.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["label"]), []).append(row)
    result = []
    for (precision, label), members in groups.items():
        line: dict[str, Any] = {"precision": precision, "method": label, "seeds": len(members)}
        for key in ("top1", "agreement", "sqnr", "units_after", "seconds"):
            line[key], line[f"{key}_spread"] = _mean_and_spread([m[key] for m in members])
        line["top1_float"] = members[0]["top1_float"]
        line["unit_count"] = _mean_and_spread([len(m["units"]) for m in members])[0]
        result.append(line)
    for line in result:
        rivals = [other for other in result if other["precision"] == line["precision"]]
        line["behind"], line["behind_margin"] = None, None
        measure = next((key for key in ("top1", "agreement") if all(other[key] is not None for other in rivals)), None)
        if measure is not None:
            best = max(rivals, key=lambda other: other[measure])
            pair = [groups[(other["precision"], other["method"])] for other in (best, line)]
            line["behind"], line["behind_margin"] = _behind(*pair)
    return result


def _behind(best: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Points between two methods over the same seeds, and half the interval of one seed's difference."""
    n = rows[0]["samples"]
    counts = [differing(a["outcomes"], b["outcomes"], n) for a, b in zip(best, rows, strict=True)]
    lost, won = (round(float(np.mean(side))) for side in zip(*counts, strict=True))
    low, high = paired_difference(lost, won, n)
    return float(np.mean([100 * (a - b) / n for a, b in counts])), (high - low) / 2 if best is not rows else 0.0


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def _settings(config: Config) -> dict[str, Any]:
    """What decides a result; where it is computed does not."""
    return {key: value for key, value in resolved(config, DataConfig()).items() if key != "device"}


def _key(row: Mapping[str, Any]) -> str:
    kept = {name: row.get(name) for name in ("sha256", "calibration", "evaluation", "settings", "version")}
    return json.dumps(kept, sort_keys=True)


def _digest(samples: Samples) -> str:
    """Of the arrays and labels, so that other data never passes for the same."""
    state = hashlib.sha256()
    for name, array in sorted(samples.inputs.items()):
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    if samples.labels is not None:
        state.update(np.ascontiguousarray(samples.labels).tobytes())
    return state.hexdigest()[:16]


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system
