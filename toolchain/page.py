"""The report as one self-contained page: a pure function of the facts in report.json, with no script and nothing from the network."""

import shlex
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from . import figures
from .block_picture import block_picture
from .capacity import oscillation
from .document import details, document, multiples, section, table
from .wording import (
    counted,
    coverage_line,
    decibel,
    duration,
    faster,
    figure,
    float_layers,
    island_lines,
    kind,
    magnitude,
    noise,
    ranges_line,
    size,
    smaller,
)

_SHIP = {"yes": "ship it", "no": "do not ship", "unclear": "undecided"}
_CURVE_KEYS = (("--orange", "reconstruction loss"), ("--blue", "rounding regulariser"), ("--muted", "its exponent"), ("--green", "decided"))
_FIT_KEYS = (("--blue", "on the grid"), ("--red", "clipped"), ("--green", "grid and its levels"))


def report_page(report: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    """The page of a `quantize` run; `baseline` is the report of another run of the same model, whose losses are overlaid."""
    name = report["model"]["path"].replace("\\", "/").rsplit("/", 1)[-1]
    config = report["config"]
    title = f"{name}, {_precision(config)}"
    sections: Iterable[Callable[[], str]] = (
        lambda: _verdict(report["verdict"]),
        lambda: _cards(report),
        lambda: _losses(report, baseline),
        lambda: _capacities(report),
        lambda: _curves(report["units"]),
        lambda: _sensitivity(report["sensitivity"]),
        lambda: _fits(report["worst_values"]),
        lambda: _float_nodes(report),
        lambda: _units(report["units"]),
        lambda: _blocks(report),
        lambda: _run(report),
    )
    text = f"For {config['target']}. {report['conventions']['algorithm']}. {_rule(report)}"
    return document(
        title,
        f"<h1>{escape(title)}</h1><p class=muted>{escape(text)}</p>",
        [part for section in sections if (part := section())],
    )


def inspect_page(facts: dict[str, Any]) -> str:
    """The page of `inspect`: blocks, capacities and proposed units, without data."""
    model, blocks = facts["model"], facts["blocks"]
    name = model["path"].replace("\\", "/").rsplit("/", 1)[-1]
    unit_of = {part: unit for unit in facts["plan"]["units"] for part in unit.split("+")}
    rows = [
        (
            block["name"],
            unit_of[block["name"]],
            kind(block),
            str(len(block["layers"])),
            f"{block['weights']:,}",
            magnitude(block["capacity"]),
            block["last_node"],
        )
        for block in blocks
    ]
    columns = ("block", "unit", "kind", "layers>", "weights>", "ModCap>", "last node")
    weights = sum(block["weights"] for block in blocks)
    text = f"{len(blocks)} blocks with {weights:,} weights, opset {model['opset']}; inputs: {escape(', '.join(model['inputs']))}."
    text += "".join(f" Open axes of {escape(axis)} were assumed as {facts['shapes'][axis]}." for axis in facts["guessed_axes"])
    islands = "".join(f"<p>Float island, left to ONNX Runtime: {escape(line)}.</p>" for line in island_lines(facts["islands"]))
    return document(
        name,
        f"<h1>{escape(name)}</h1><p class=muted>{text}</p>",
        [_capacities(facts), _blocks(facts), section("Table", "", islands, table(columns, rows))],
    )


def _precision(config: dict[str, Any]) -> str:
    bits = f"W{config['weight-bits']}A{config['activation-bits']}"
    return bits if config.get("number-format", "int") == "int" else f"{bits} in fp8"


def _verdict(verdict: dict[str, str]) -> str:
    ship, sentence = verdict["ship"], verdict["sentence"]
    return f'<section class="verdict {ship}"><b>{_SHIP[ship]}</b> {escape(sentence[:1].upper() + sentence[1:])}.</section>'


def _cards(report: dict[str, Any]) -> str:
    v, seconds = report["validation"], report["seconds"]
    cards = []
    if v.get("metric"):
        m = v["metric"]
        change = f"{'-' if v['drop'] > 0 else '+'}{figure(abs(v['drop']))}"
        low, high = v["intervals"].get("drop", (None, None))
        interval = "" if low is None else f" (95 %: {figure(-high)} to {figure(-low)}, paired by samples)"
        cards.append((m["name"], figure(m["quantized_value"]), f"float {figure(m['float_value'])}; change {change}{interval}"))
    if v["top1_float"] is not None:
        low, high = v["intervals"]["top1_quantized"]
        a, b = v["intervals"]["top1_float"]
        cards.append(
            (
                "top-1 accuracy",
                f"{v['top1_quantized']:.2f} %",
                f"95 %: {low:.1f} to {high:.1f}; float {v['top1_float']:.2f} ({a:.1f} to {b:.1f})",
            )
        )
        low, high = v["intervals"]["drop"]
        cards.append(
            ("change", f"{-v['drop']:+.2f} points", f"95 %: {-high:+.2f} to {-low:+.2f}, paired over {counted(v['samples'], 'sample')}")
        )
    if v["agreement"] is not None:
        low, high = v["intervals"]["agreement"]
        cards.append(("same prediction as float", f"{v['agreement']:.2f} %", f"95 %: {low:.1f} to {high:.1f}"))
    cards.append(("signal to noise", noise(v), f"of the output, on {v['evaluated_on'].rsplit('/', 1)[-1]}"))
    cards.append(("file", size(v["quantized_bytes"]), f"{smaller(v)} than {size(v['float_bytes'])}"))
    if v["has_kernels"]:
        latency = v["latency"]
        provider = v["provider"].removesuffix("ExecutionProvider")
        cards.append(
            (
                "latency",
                f"{latency['quantized_ms']:.2f} ms",
                f"{faster(latency)} than {latency['float_ms']:.2f} ms; batch {latency['batch']}, {provider}",
            )
        )
        floats = ", ".join(f"{count} {kind}" for kind, count in v["float_layers"].items())
        cards.append(("integer kernels", str(v["integer_operators"]), floats + " in float" if floats else "no layer runs in float"))
    cards.append(
        (
            "time taken",
            duration(seconds["total"]),
            f"{duration(seconds['reconstruct'])} of it reconstruction, {report['environment']['device']}",
        )
    )
    items = "".join(
        f"<div class=card><small>{escape(k)}</small><div class=value>{escape(v)}</div><small>{escape(t)}</small></div>" for k, v, t in cards
    )
    return f"<div class=cards>{items}</div>"


def _losses(report: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    if not report["units"]:
        return ""
    o = report["oscillation"]
    text = (
        "Squared error of each block's output against the float model, everything before it quantized too. Shaded blocks are one unit: "
        "they were reconstructed jointly, and only the unit's last output has a loss. "
        "The oscillation (sum of the drops from one to the next, 0 for a loss that only accumulates) is "
        f"{figure(o['blocks_calibrated'])} over the calibrated blocks, {figure(o['units_before'])} over the units before and "
        f"{figure(o['units_after'])} after reconstruction."
    )
    if baseline is not None:
        other = baseline["oscillation"]["units_after"]
        found = f"{other:.4g} after reconstruction" if other is not None else "not measured (nothing was reconstructed)"
        text += f" In the overlaid run, with units {escape(baseline['config']['units'])}, it is {found}"
        ends = {unit["unit"].split("+")[-1] for unit in report["units"]}
        there = [figures.final(unit) for unit in baseline["units"] if unit["unit"].split("+")[-1] in ends]
        text += f", and {oscillation(there):.4g} over the blocks at which this run's units end." if len(there) > 1 else "."
    return section("Reconstruction loss", text, figures.losses(report, baseline))


def _capacities(report: dict[str, Any]) -> str:
    merged = [row for row in report["plan"]["boundaries"] if row["merged"]]
    text = f"Parameters times bits of each block, scaled where a stage opens. {escape(_rule(report))}"
    chosen = _boundaries(merged) if merged else "<p>No blocks are joined.</p>"
    every = details("all boundaries", _boundaries(report["plan"]["boundaries"], are_all=True))
    return section("Capacity and units", text, figures.capacities(report), chosen, every)


def _rule(report: dict[str, Any]) -> str:
    """How the units were found."""
    units, _, why = report["plan"]["why"].partition(": ")
    return f"Units ({units}): {why}."


def _boundaries(found: list[dict[str, Any]], are_all: bool = False) -> str:
    """Squared difference of capacities, the drop of the loss where it was measured, and why neighbours were joined or not."""
    measured = any(row["loss_drop"] is not None for row in found)
    columns = ("neighbours", "capacity gap²>", *(["loss drop>"] if measured else []), *(["joined"] if are_all else []), "why")
    rows = []
    for row in found:
        drop = "" if row["loss_drop"] is None else f"{row['loss_drop']:+.4g}"
        joined = ["yes" if row["merged"] else ""] if are_all else []
        rows.append((" | ".join(row["blocks"]), f"{row['capacity_gap']:.3g}", *([drop] if measured else []), *joined, row["reason"]))
    return table(columns, rows)


def _curves(units: list[dict[str, Any]]) -> str:
    drawn = [unit for unit in units if unit["curve"]["iteration"]]
    if not drawn:
        return ""
    pictures = []
    for i, unit in enumerate(drawn):
        text = f"loss {figure(unit['loss_before'])} → {figure(unit['loss_after'])}"
        if unit["undecided"] is not None:
            text += f", {100 * (1 - unit['undecided']):.1f} % decided"
        if unit["kept"] == "initial":
            text += ", kept as calibrated"
        pictures.append((unit["unit"], text, figures.curve(i, unit)))
    keys = [
        (color, words)
        for (color, words), key in zip(_CURVE_KEYS, figures.CURVES, strict=True)
        if any(value is not None for unit in drawn for value in unit["curve"][key])
    ]
    text = "Over the iterations, each as a share of its largest value; the loss is that of a mini-batch."
    if any(unit["undecided"] is not None for unit in drawn):
        text += " Decided: weights whose rounding is all but made."
    return section("How each unit was learned", text, multiples(keys, pictures))


def _sensitivity(found: dict[str, Any]) -> str:
    if found["skipped"] is not None:
        return section("Sensitivity of the layers", f"Not measured: {escape(found['skipped'])}.")
    if not found["layers"]:
        return ""
    text = (
        f"Signal to noise of the output over {counted(found['samples'], 'sample')}. A layer with a low blue dot hurts by itself; one whose "
        "orange dot is far to the right of the line is worth keeping float or giving more bits; left of the line, what follows has "
        "learned to make up for it. A layer is its weight, its bias and its input."
    )
    rows = [
        (row["node"], f"{row['weight_bits']}/{row['input_bits'] or 'float'}", decibel(row["only_quantized"]), decibel(row["only_float"]))
        for row in found["layers"]
    ]
    columns = ("layer", "bits W/A>", "only it quantized>", "only it float>")
    return section(
        "Sensitivity of the layers", text, figures.sensitivities(found), details(f"all {len(rows)} layers", table(columns, rows))
    )


def _fits(values: list[dict[str, Any]]) -> str:
    if not values:
        return ""
    pictures = [
        (
            value["name"],
            f"{value['kind']}, {value['bits']} bits, {decibel(value['sqnr'])}, {100 * value['clipped']:.2g} % clipped",
            figures.histogram(i, value),
        )
        for i, value in enumerate(values)
    ]
    text = (
        "The weights and activations with the most rounding noise of their own, counts on a logarithmic axis. Weights are in steps of "
        "their channel's grid; activations in their own unit, as the float model makes them."
    )
    return section("Values that their grid fits worst", text, multiples(_FIT_KEYS, pictures))


def _float_nodes(report: dict[str, Any]) -> str:
    text = f"Weights on integer grids: {coverage_line(report['coverage'])}."
    text += "".join(f" Float island, left to ONNX Runtime: {escape(line)}." for line in island_lines(report["islands"]))
    rows = [(row["node"], row["op_type"], row["reason"]) for row in report["float_nodes"]]
    rows += [(row["node"], row["op_type"], f"runs in float: {row['reason']}") for row in float_layers(report)]
    return section("What stayed float", text, table(("node", "operator", "why"), rows) if rows else "<p>Nothing that has weights.</p>")


def _units(units: list[dict[str, Any]]) -> str:
    if not units:
        return ""
    rows = [
        (
            unit["unit"],
            figure(unit["loss_before"]),
            figure(unit["loss_after"]),
            f"{100 * (unit['loss_after'] / unit['loss_before'] - 1):+.0f} %"
            if unit["loss_before"] and unit["loss_after"] is not None
            else "",
            f"{100 * unit['flipped']:.1f} %",
            "" if unit["undecided"] is None else f"{100 * unit['undecided']:.1f} %",
            str(unit["iterations"]),
            f"{unit['seconds']:.1f}",
            "learned" if unit["reason"] is None else f"calibrated: {unit['reason']}",
        )
        for unit in units
    ]
    columns = ("unit", "loss before>", "after>", "change>", "flipped>", "undecided>", "iterations>", "seconds>", "kept")
    text = (
        "Hard-quantized losses over all calibration samples; the better of the two is kept. Flipped: weights rounded to the other side "
        "than the nearest. Undecided: weights whose soft rounding was still open at the end; many of them ask for more iterations."
    )
    return section("Units", text, table(columns, rows))


def _blocks(report: dict[str, Any]) -> str:
    text = f"{len(report['blocks'])} blocks in {len(report['plan']['units'])} units, from the input down. "
    text += "Frames are units of several blocks; orange boxes open a stage."
    return section("Blocks", text, f'<div class="picture">{block_picture(report).svg()}</div>')


def _run(report: dict[str, Any]) -> str:
    model, environment = report["model"], report["environment"]
    memory = report["memory_peak_bytes"]
    facts = [
        ("model", f"{model['path']}, opset {model['opset']}"),
        ("sha256", model["sha256"]),
        ("output", model["output"]),
        ("target", f"{report['conventions']['target']}; {report['conventions']['target_reasons']}"),
        ("precision", report["conventions"]["precision"]),
        (
            "calibration",
            f"{counted(report['calibration']['samples'], 'sample')}; "
            f"import to torch differs by {figure(report['calibration']['import_error'])} at most",
        ),
        *([("activation ranges", ranges_line(report["calibration"]["ranges"]))] if report["calibration"]["ranges"] else []),
        *(("note", note) for note in model["notes"]),
        ("machine", f"{environment['gpu'] or environment['processor']}, {environment['cores']} cores, {environment['platform']}"),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in environment["versions"].items()) + f", Python {environment['python']}",
        ),
        ("time", _stages(report)),
        ("memory", size(memory) + " at most" if memory is not None else "not measured on this system"),
    ]
    options = " ".join(f"<span>{escape(written)}</span>" for key, value in report["config"].items() for written in _option(key, value))
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    return section("The run", "", f"<dl>{items}<dt>options</dt><dd><code>{options}</code></dd></dl>")


def _stages(report: dict[str, Any]) -> str:
    """Seconds by stage, and what the papers' number of iterations would take."""
    seconds = dict(report["seconds"])
    best = seconds.pop("best_preset_estimate")
    text = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    return text if best is None else f"{text}; --preset best would reconstruct for about {duration(best)} on this machine"


def _option(key: str, value: Any) -> list[str]:
    """A setting as it is written on the command line."""
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    return [f"--{key} {shlex.quote(str(item))}" for item in (value if isinstance(value, list) else [value])]
