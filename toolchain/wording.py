"""The figures of a run in words, the same in the terminal and on the page."""

import shlex
from collections.abc import Sequence
from typing import Any

_MOST_BLOCKS = 8


def size(count: int) -> str:
    """Bytes as GB, MB or kB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def counted(count: int, thing: str) -> str:
    """So many of a thing."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def magnitude(count: float) -> str:
    """A large number in three digits, as 36.1k or 9.44M."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= power:
            return f"{count / power:#.3g}".rstrip(".") + letter
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figure(value: float | None) -> str:
    """A loss or a value of a metric; a report has None for what is no finite number."""
    return f"{value + 0.0:.4g}" if value is not None else "infinite"  # zero has no sign


def faster(latency: dict[str, float]) -> str:
    """The quantized model beside the float one."""
    ratio = latency["float_ms"] / latency["quantized_ms"]
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def smaller(v: dict[str, Any]) -> str:
    """The quantized file beside the float one."""
    ratio = v["float_bytes"] / v["quantized_bytes"]
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"


def decibel(value: float | None, digits: int = 1) -> str:
    """A ratio in dB; None stands for infinite."""
    return f"{value:.{digits}f} dB" if value is not None else "exact"


def worst_sqnr(v: dict[str, Any]) -> float | None:
    """The least SQNR over the outputs of a validation that are no selections; None where all are exact."""
    told = (value for name, value in v["sqnr"].items() if name not in v.get("selected", ()))
    return min((value for value in told if value is not None), default=None)


def noise(v: dict[str, Any]) -> str:
    """The least SQNR over the outputs of a validation, or why there is none."""
    return "none, of selections" if _selects_only(v) else decibel(worst_sqnr(v))


def _selects_only(v: dict[str, Any]) -> bool:
    """Whether all outputs are selections."""
    return v["sqnr"].keys() <= set(v.get("selected", ()))


def kind(block: dict[str, Any]) -> str:
    """What a block is."""
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
        held = f", with {counted(weights, 'weight')}" if weights else ""
        blocks = [row["block"] for row in rows]
        named = ", ".join(blocks if len(blocks) <= _MOST_BLOCKS else [*blocks[:_MOST_BLOCKS], f"and {len(blocks) - _MOST_BLOCKS} more"])
        lines.append(f"{counted(count, 'node')}{held}: {reason} ({named})")
    return lines


def short_names(names: Sequence[str], room: int) -> list[str]:
    """Names of nodes in so many characters: whole, or without what says nothing (`/features/features.1/conv/Conv`: `features.1/conv`), or
    the ends, which tell layers apart."""
    if all(len(name) <= room for name in names):
        return list(names)
    brief = [_brief(name) for name in names]
    chosen = brief if len(set(brief)) == len(set(names)) else names
    return [name if len(name) <= room else "…" + name[1 - room :] for name in chosen]


def _brief(name: str) -> str:
    """A node's name as torch exports it, without the parts that the next one repeats and without the operator at its end."""
    parts = name.strip("/").split("/")
    if len(parts) > 1 and parts[-1].isalpha() and parts[-1][0].isupper():
        del parts[-1]
    kept = [part for part, after in zip(parts, [*parts[1:], ""], strict=True) if not after.startswith(f"{part}.")]
    return "/".join(kept)


def behind(line: dict[str, Any]) -> str:
    """How far a compared method is behind the best one, with half the interval of that."""
    if line["behind"] is None:
        return ""
    return f"{line['behind']:.2f} ±{line['behind_margin']:.2f}" if line["behind_margin"] else "best"


def steps(count: float | None) -> str:
    """A difference in steps of a grid; None stands for infinite, or for no number."""
    if count is None:
        return "infinitely many steps"
    return counted(round(count), "step")


def coverage_line(cover: dict[str, Any]) -> str:
    """How much of the weights is on integer grids; `stored` ones are those that are computed with in float."""
    share = 100 * cover["weights_quantized"] / max(cover["weights"], 1)
    text = f"{share:.1f} % of {cover['weights']:,} ({cover['layers_quantized']} of {cover['layers']} layers)"
    if not cover.get("stored"):
        return text
    share = 100 * cover["stored_quantized"] / cover["stored"]
    return f"{text}; {share:.1f} % of {cover['stored']:,} in tables, recurrent layers and control flow, which compute in float"


def float_layers(report: dict[str, Any]) -> list[dict[str, str]]:
    """The convolutions and matrix products that are executed in float though nothing before says so of them."""
    said = {row["node"] for row in report["float_nodes"]} | {name for island in report["islands"] for name in island["nodes"]}
    v = report["validation"]
    return [row for row in v["float_operators"] if row["op_type"] in v["float_layers"] and row["node"] not in said]


def headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Accuracy, speed, size and exactness of a run, one line each."""
    v = report["validation"]
    sizes = f"{size(v['float_bytes'])} float, {size(v['quantized_bytes'])} quantized: {smaller(v)}"
    return [
        ("accuracy", _accuracy(v)),
        ("speed", _speed(v, report["config"]["target"], report["coverage"])),
        ("size", sizes),
        ("exact", _exactness(v)),
    ]


def remedy(report: dict[str, Any]) -> str:
    """What to do about a result that is not good enough."""
    config, model = report["config"], report["model"]
    data = config.get("eval-data", config["calibration-data"])
    words = ["mrecg-onnx", "diagnose", model["path"], model["output"], "--data", "DATA" if data == "synthetic" else data]
    text = f"{shlex.join(words)} shows where the error enters"
    best = report["seconds"]["best_preset_estimate"]
    if best is None or (config["preset"] == "best" and "iterations" not in config):
        return text
    return f"{text}; --preset best would reconstruct for about {duration(best)} here"


def _accuracy(v: dict[str, Any]) -> str:
    parts = []
    if v.get("metric"):
        parts.append(metric_line(v["metric"]))
    if v["top1_float"] is not None:
        low, high = v["intervals"]["top1_quantized"]
        parts.append(f"top-1 {v['top1_float']:.2f} % float, {v['top1_quantized']:.2f} % quantized (95 %: {low:.1f} to {high:.1f})")
    if v["agreement"] is not None:
        parts.append(f"{v['agreement']:.2f} % the same prediction as float")
    parts.append(f"SQNR {noise(v)}")
    nowhere = f", of which the float model makes NaN on {v['nan_samples']:,}" if v.get("nan_samples") else ""
    unused = (
        "; labels not used: no output scores or names classes"
        if v.get("has_labels") and v["top1_float"] is None and not v.get("metric")
        else ""
    )
    return f"{'; '.join(parts)}; {counted(v['samples'], 'sample')} of {v['evaluated_on']}{nowhere}{unused}"


def metric_line(m: dict[str, Any]) -> str:
    """A measure of the user's own, float and quantized."""
    return f"{m['name']} {figure(m['float_value'])} float, {figure(m['quantized_value'])} quantized"


def _speed(v: dict[str, Any], target: str, cover: dict[str, Any]) -> str:
    if not v["has_kernels"]:
        return f"that of {target} is not measured here: ONNX Runtime stands in for it and computes in float between the quantizers"
    latency = v["latency"]
    floats = ", ".join(f"{count} {kind}" for kind, count in v["float_layers"].items())
    count = v["integer_operators"]
    kernels = f"{counted(count, 'integer kernel')}, {floats + ' in float' if floats else 'no layer in float'}"
    is_other = target == "ort-cuda" and v["provider"] == "CPUExecutionProvider"
    elsewhere = f"; measured here under ONNX Runtime, which says nothing of {target}" if is_other else ""
    is_unpacked = latency["quantized_ms"] > latency["float_ms"] and _is_mostly_stored(cover)
    why = f"; the {cover['stored_quantized']:,} weights that are only stored as codes become floats in every run" if is_unpacked else ""
    return (
        f"{latency['float_ms']:.2f} ms float, {latency['quantized_ms']:.2f} ms quantized: {faster(latency)} at batch {latency['batch']} "
        f"({v['provider'].removesuffix('ExecutionProvider')}); {kernels}{why}{elsewhere}"
    )


def _is_mostly_stored(cover: dict[str, Any]) -> bool:
    """Whether more weights are only stored as codes than are computed with as such."""
    return cover.get("stored_quantized", 0) > cover["weights_quantized"]


def _exactness(v: dict[str, Any]) -> str:
    arithmetic, found = v["integer_arithmetic"], v["simulation"]
    text = f"each {'kernel' if v['has_kernels'] else 'operator'} within {steps(arithmetic['steps'])} of what the file says"
    if found is None or (found["agreement"] is None and _selects_only(v)):
        return text
    if found["agreement"] is not None:
        return f"{text}; {found['agreement']:.2f} % the same prediction as the simulation that was learned"
    return f"{text}; {decibel(found['sqnr'])} to the simulation that was learned"


def ranges_line(choices: list[dict[str, Any]]) -> str:
    """Which method the ranges of activations are from, and what was tried, from the report."""

    def tried(choice: dict[str, Any]) -> str:
        found = [f"{name} {value:.1f}" for name, value in choice["sqnr"].items() if value is not None]
        return f"{choice['bits']} bits: {choice['method']} ({', '.join(found) + ' dB' if found else 'no output could be compared'})"

    return f"chosen by the SQNR of the outputs with these activations alone quantized: {'; '.join(map(tried, choices))}"


def unnamed(reason: str) -> tuple[str, str]:
    """A reason without the one value that it names in quotes, so that nodes with the same reason can be counted; and that value, or ""."""
    parts = reason.split("'")
    if len(parts) != 3:
        return reason, ""
    return reason.replace(f"its result '{parts[1]}'", "its result").replace(f"'{parts[1]}'", "a value"), parts[1]
