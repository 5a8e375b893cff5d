"""The terminal: progress, the closing summary and the tables. Every number comes from the JSON-ready facts of `report`."""

import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from .wording import (
    behind,
    counted,
    coverage_line,
    decibel,
    duration,
    faster,
    figure,
    float_layers,
    headline,
    island_lines,
    kind,
    magnitude,
    ranges_line,
    remedy,
    size,
    smaller,
    steps,
    unnamed,
)

_SHIP = {"yes": "bold green", "no": "bold red", "unclear": "bold yellow"}
_MOST_ROWS = 8  # of one kind in the closing summary; the rest is in the report
_HEARTBEAT = 30.0  # seconds between lines where there is no terminal to draw a bar on
_NAME = 28  # characters of a node's name in a table
_NARROW = 76  # columns below which the bar gives way to the figures

Progress = Callable[[str, int, int, float], None]


def summary(report: dict[str, Any]) -> Group:
    """Five lines for the one who deploys the model, then whatever did not go as asked."""
    verdict = report["verdict"]
    lines = [
        ("ship", f"[{_SHIP[verdict['ship']]}]{verdict['ship']}[/]: {escape(verdict['sentence'])}"),
        *((key, escape(text)) for key, text in headline(report)),
    ]
    if verdict["ship"] == "no":
        lines.append(("next", escape(remedy(report))))
    reasons: dict[str, list[str]] = {}
    for unit in report["units"]:
        if unit["reason"] is not None:
            reasons.setdefault(unit["reason"], []).append(unit["unit"])
    lines += [("as calibrated", f"{escape(', '.join(units))}: {escape(reason)}") for reason, units in reasons.items()]
    lines += [("note", escape(note)) for note in report["model"]["notes"]]
    lines += [("float island", escape(line)) for line in island_lines(report["islands"])]
    floats = [f"{row['op_type']} {row['node']}: {row['reason']}" for row in report["float_nodes"]]
    lines += [("stays float", escape(text)) for text in floats[:_MOST_ROWS]]
    if len(floats) > _MOST_ROWS:
        lines.append(("", f"and {len(floats) - _MOST_ROWS} more, all in the report"))
    alike: dict[tuple[str, str], list[str]] = {}
    for row in float_layers(report):
        alike.setdefault((row["op_type"], unnamed(row["reason"])[0]), []).append(row["node"])
    for (operator, reason), (first, *others) in alike.items():
        more = f" and {len(others)} more" if others else ""
        lines.append(("runs in float", escape(f"{operator} {first}{more}: {reason}")))
    return Group(_facts(lines))


def details(report: dict[str, Any]) -> Group:
    """What `--verbose` adds: the whole validation, how the result came about, and the units."""
    cover, seconds, config = report["coverage"], report["seconds"], report["config"]
    facts = [
        ("weights on integer grids", coverage_line(cover)),
        ("target", escape(report["conventions"]["target"])),
        ("convention", escape(report["conventions"]["precision"])),
    ]
    if report["calibration"]["ranges"]:
        facts.append(("activation ranges", ranges_line(report["calibration"]["ranges"])))
    parts: list[Any] = [validation_table(report["validation"])]
    if report["units"]:
        improved = sum(u["kept"] == "learned" for u in report["units"])
        before, after = (report["oscillation"][key] for key in ("blocks_calibrated", "units_after"))
        merges = ", ".join(name for name in report["plan"]["units"] if "+" in name) or "none"
        facts += [
            ("units", f"{len(report['plan']['units'])} of {len(report['blocks'])} blocks; joined: {merges}"),
            ("reconstruction", f"{improved} of {len(report['units'])} units improved, {seconds['reconstruct']:.0f} s"),
            ("oscillation of the loss", f"{figure(before)} calibrated, {figure(after)} reconstructed"),
        ]
        if config["preset"] != "best" or "iterations" in config:
            facts.append(("--preset best", f"would reconstruct for about {duration(seconds['best_preset_estimate'])} here"))
        parts.append(unit_table(report))
    return Group(*parts, _facts(facts))


def unit_table(report: dict[str, Any]) -> Table:
    """One line for each unit: losses before and after, what was kept."""
    table = _table("Units", "unit", "loss before>", "after>", "kept", "flipped>", "seconds>")
    for unit in report["units"]:
        flipped, seconds = f"{100 * unit['flipped']:.1f} %", f"{unit['seconds']:.1f}"
        table.add_row(unit["unit"], figure(unit["loss_before"]), figure(unit["loss_after"]), unit["kept"], flipped, seconds)
    return table


def block_table(plan: dict[str, Any], width: int) -> Table:
    """One line for each block: what it is, its capacity, and the unit it is reconstructed in when that is larger."""
    columns = ["block", "unit", "kind", "opens", "layers>", "weights>", "ModCap>", *([] if width < _NARROW else ["last node"])]
    table = _table("Blocks", *columns)
    unit_of = {part: unit for unit in plan["plan"]["units"] for part in unit.split("+")}
    for block in plan["blocks"]:
        unit = unit_of[block["name"]]
        cells = [
            block["name"],
            unit if "+" in unit else "",
            kind(block),
            "stage" if block["opens_stage"] and block["layers"] else "",
            str(len(block["layers"])),
            magnitude(block["weights"]),
            magnitude(block["capacity"]),
            escape("/".join(block["last_node"].split("/")[-2:])),
        ]
        table.add_row(*cells[: len(columns)])
    return table


def show_inspection(console: Console, facts: dict[str, Any]) -> None:
    """What `inspect` found: the blocks, the inputs, the units, and whatever was assumed or stays float."""
    console.print(block_table(facts, console.width))
    console.print(f"inputs: {escape(', '.join(facts['model']['inputs']))}; opset {facts['model']['opset']}")
    console.print(f"units: {escape(facts['plan']['why'])}")
    for name in facts["guessed_axes"]:
        assumed = tuple(facts["shapes"][name])
        console.print(f"[yellow]input {escape(name)} leaves axes open; assumed {assumed}, --input-shape sets them[/yellow]")
    for note in facts["model"]["notes"]:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for line in island_lines(facts["islands"]):
        console.print(f"[yellow]float island, left to ONNX Runtime:[/yellow] {escape(line)}")


def diagnosis_table(facts: dict[str, Any], most: int | None, width: int) -> Group:
    """The layers that add most noise, and what to try; `most` rows, None for all. A narrow terminal shows fewer figures of each."""
    outputs = ", ".join(f"{name} {decibel(value)}" for name, value in facts["outputs"].items())
    columns = ("added", "total", *(() if width < _NARROW else ("weight", "input")), "gain")
    table = _table(
        f"Noise by layer, {counted(facts['samples'], 'sample')}; outputs: {outputs}", *(f"{column}>" for column in columns), "layer"
    )
    for layer in facts["layers"][:most]:
        gain = layer["gain"]
        cells = {
            "added": decibel(layer["added"]),
            "total": decibel(layer["total"]),
            "weight": "float" if layer["weight"] is None else decibel(layer["weight"]),
            "input": "float" if layer["input"] is None else decibel(layer["input"]),
            "gain": f"{gain:+.1f} dB" if gain is not None else "",
        }
        table.add_row(*(cells[column] for column in columns), escape(_tail(layer["node"])))
    parts: list[Any] = [table]
    if most is not None and len(facts["layers"]) > most:
        parts.append(Text(f"and {len(facts['layers']) - most} layers that add less; --verbose lists them", style="dim"))
    halves = [f"{decibel(facts[f'float_{kind}'])} with float {kind}" for kind in ("weights", "activations")]
    parts.append(Text(f"the output would have {' and '.join(halves)}", style="dim"))
    tries = [("try", escape(text)) for text in facts["suggestions"]] or [("", "nothing stands out")]
    return Group(*parts, _facts(tries))


def equalization_table(facts: dict[str, Any]) -> Group:
    """The values that were looked at: the signal to noise of their readers' results before and after, and what was done."""
    table = _table(f"Results of what reads a normalization, {facts['precision']}", "before>", "after>", "strength>", "done", "value")
    for row in facts["values"]:
        done = ("folded" if row["folded"] else "scaled copy") if row["strength"] else "left"
        ratios = (row["errors"][f"{strength:g}"] for strength in (0, row["strength"]))
        before, after = (decibel(-10 * math.log10(error) if error else None) for error in ratios)
        table.add_row(
            before, after if row["strength"] else "", f"{row['strength']:g}" if row["strength"] else "", done, escape(_tail(row["value"]))
        )
    changed = sum(row["strength"] > 0 for row in facts["values"])
    if not facts["values"]:
        said = "nothing to equalize: no normalization's result is on a grid for layers alone whose weights nothing else reads"
    elif not changed:
        said = "nothing is enough better: left as it is"
    else:
        copies = sum(row["strength"] > 0 and not row["folded"] for row in facts["values"])
        said = f"{changed} of {len(facts['values'])} values equalized" + (f", {copies} of them by a Mul" if copies else "")
    agreement = f"; its outputs are the float model's: {decibel(facts['agreement'])}" if changed else ""
    lines = [("equal", escape(said + agreement)), *(("note", escape(note)) for note in facts["notes"]), ("wrote", escape(facts["output"]))]
    if changed:
        lines.append(("next", escape(f"mrecg-onnx quantize {shlex.quote(facts['output'])} -p {facts['precision']} --calibration-data ...")))
    return Group(*([table] if facts["values"] else []), _facts(lines))


def comparison_table(lines: list[dict[str, Any]], width: int) -> Table:
    """Mean and spread over the seeds of each method; top-1 and agreement in percent. A narrow terminal shows fewer figures."""
    is_wide, is_labelled = width >= _NARROW, any(line["top1"] is not None for line in lines)
    measures = {"top-1>": "top1", "same>": "agreement"} if is_wide else {"top-1>": "top1"} if is_labelled else {"same>": "agreement"}
    title = "Methods: mean ± standard deviation over seeds; "
    title += "same: % of predictions equal to float; " if "same>" in measures else ""
    title += "behind: points behind the best ± half the 95 % interval over samples"
    title += "; osc.: oscillation, the sum of the drops of the loss" if is_wide else ""
    table = _table(title, "bits", "method", *measures, "SQNR dB>", "behind>", *(("osc.>",) if is_wide else ()))
    for line in lines:
        cells = [_spread(line, key, ".1f") for key in (*measures.values(), "sqnr")]
        oscillation = [_spread(line, "units_after", ".3g")] if is_wide else []
        table.add_row(line["precision"], escape(line["method"]), *cells, behind(line), *oscillation)
    return table


def _spread(line: dict[str, Any], key: str, form: str) -> str:
    value, spread = line[key], line[f"{key}_spread"]
    if value is None:
        return ""
    return f"{value:{form}}" + (f" ±{spread:{form.replace('3', '2')}}" if spread is not None else "")


def allocation_table(facts: dict[str, Any]) -> Table:
    """The files that were tried, by the number of layers with more bits, and the layers that were chosen."""
    to, unit = facts["to"], facts["metric"] or "points"
    title = f"{facts['precision']}, layers with the most noise at {to}; {counted(facts['samples'], 'evaluation sample')}"
    table = _table(title, f"layers at {to}>", f"drop, {unit}>", "SQNR dB>", "")
    for trial in sorted(facts["trials"], key=lambda trial: trial["layers"]):
        is_chosen = facts["holds"] and trial["layers"] == len(facts["layers"])
        drop = figure(trial["drop"]) if trial["drop"] is not None else ""
        ratio = f"{trial['sqnr']:.1f}" if trial["sqnr"] is not None else ""
        table.add_row(f"{trial['layers']} of {len(facts['room'])}", drop, ratio, "[green]chosen[/green]" if is_chosen else "")
    return table


def study_findings(findings: dict[str, dict[str, Any]]) -> Table:
    """Each claim with its verdict."""
    words = {True: "[green]holds[/green]", False: "[red]does not hold[/red]", None: "[yellow]undecided[/yellow]"}
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings.values():
        table.add_row(words[finding["holds"]], f"[bold]{escape(finding['claim'])}[/bold]\n{escape(finding['verdict'])}")
    return table


def validation_table(v: dict[str, Any]) -> Table:
    """Float beside quantized, as ONNX Runtime executes them."""
    table = _table(f"{v['provider']}, {counted(v['samples'], 'sample')} of {v['evaluated_on']}", "", "float>", "quantized>", ">")
    if v.get("metric"):
        m = v["metric"]
        a, b = m["float_value"], m["quantized_value"]
        change = f"{'-' if b < a else '+'}{figure(abs(b - a))}"
        table.add_row(escape(m["name"]), figure(a), figure(b), change + _paired(v, figure))
    for key in ("top1", "top5"):
        if v[f"{key}_float"] is not None:
            a, b = v[f"{key}_float"], v[f"{key}_quantized"]
            interval = _paired(v, lambda value: f"{value:+.2f}") if key == "top1" else ""
            table.add_row(f"{key[:3]}-{key[3]} accuracy", f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f} points{interval}")
    if v["agreement"] is not None:
        table.add_row("same prediction as float", "", f"{v['agreement']:.2f} %", "")
    for name, value in v["sqnr"].items():
        ratio = "a selection" if name in v.get("selected", ()) else f"{value:.2f} dB" if value is not None else "exact"
        table.add_row(f"SQNR of {escape(name)}", "", ratio, "")
    table.add_row("file", size(v["float_bytes"]), size(v["quantized_bytes"]), smaller(v))
    if v["has_kernels"]:
        latency = v["latency"]
        table.add_row(
            f"latency, batch {latency['batch']}", *(f"{latency[key]:.2f} ms" for key in ("float_ms", "quantized_ms")), faster(latency)
        )
        floats = ", ".join(f"{count} {kind}" for kind, count in v["float_layers"].items()) or "no layer in float"
        table.add_row("integer kernels", "", str(v["integer_operators"]), floats)
    else:
        table.add_row("integer kernels", "", "off", "the file is for another runtime")
    alike = Counter((row["op_type"], unnamed(row["reason"])[0]) for row in v["float_operators"]).most_common()
    for (operator, reason), count in alike[:_MOST_ROWS]:
        table.add_row("computes in float", "", f"{count} {operator}", escape(reason))
    if len(alike) > _MOST_ROWS:
        table.add_row("computes in float", "", f"{sum(count for _, count in alike[_MOST_ROWS:])} others", "")
    arithmetic = v["integer_arithmetic"]
    what = "kernel" if v["has_kernels"] else "operator"
    table.add_row(f"each {what} = float", "", f"within {steps(arithmetic['steps'])}", f"{arithmetic['share']:.2g} % of codes differ")
    if v["simulated_arithmetic"] is not None:
        s = v["simulated_arithmetic"]
        table.add_row("file = simulation", "", f"within {steps(s['steps'])}", f"{s['values']} values, {s['share']:.2g} % of codes differ")
    if v["simulation"] is not None:
        s = v["simulation"]
        agrees = f"{s['agreement']:.2f} %" if s["agreement"] is not None else f"{s['sqnr']:.1f} dB" if s["sqnr"] is not None else "exact"
        table.add_row("ONNX Runtime = simulation", "", agrees, f"{s['sqnr']:.1f} dB" if s["sqnr"] is not None else "exact")
    return table


def _paired(v: dict[str, Any], form: Callable[[float], str]) -> str:
    """The interval of the change, where there is one."""
    found = v["intervals"].get("drop")
    return f" (95 %: {form(-found[1])} to {form(-found[0])})" if found else ""


def _table(title: str, *columns: str) -> Table:
    """A plain table; a column whose name ends in > is aligned to the right, and the last one gives way on narrow terminals."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        is_last = column is columns[-1]
        justify = "right" if column.endswith(">") else "left"
        table.add_column(column.removesuffix(">"), justify=justify, no_wrap=not is_last, overflow="ellipsis")
    return table


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """A bar with loss, rate and time left on a terminal; elsewhere a line for each new piece of work and every half minute."""
    if console.quiet:
        yield lambda *_: None
    elif not console.is_terminal:
        yield _Lines(console).show
    else:
        with Bars(*_columns(console.width), console=console, transient=True, expand=True) as bars:
            yield _Bar(bars).show


class _Lines:
    """For pipes and the logs of build servers: no control characters, no line twice."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what, self._stage, self._first = "", "", 0
        self._printed = self._started = time.monotonic()

    def show(self, what: str, done: int, total: int, loss: float) -> None:
        now = time.monotonic()
        stage = what.split()[0]
        if stage != self._stage:
            self._stage, self._started, self._first = stage, now, done  # a resumed stage does not start at 0
        if what == self._what and now - self._printed < _HEARTBEAT:
            return
        parts = [f"{100 * done // max(total, 1)} %"]
        if loss == loss:
            parts.append(f"loss {loss:.4g}")
        spent, made = now - self._started, done - self._first
        if made > 0 and spent > 1:
            parts += [f"{made / spent:.3g} steps/s"] if _counts_steps(what) else []
            parts.append(f"{duration((total - done) * spent / made)} left")
        self._what, self._printed = what, now
        self._console.print(f"{what} ({', '.join(parts)})", soft_wrap=True, markup=False)


def _counts_steps(what: str) -> bool:
    """Whether progress is counted in steps of an optimisation, whose rate says something."""
    return what.startswith("reconstructing")


class _Bar:
    """One bar that starts anew with each stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task, self._stage = bars.add_task("starting", loss=""), ""

    def show(self, what: str, done: int, total: int, loss: float) -> None:
        if what.split()[0] != self._stage:
            self._stage = what.split()[0]
            self._bars.reset(self._task, completed=done)  # a resumed stage does not start at 0
        text = f"loss {loss:.3g}" if loss == loss else ""
        self._bars.update(self._task, description=escape(what), completed=done, total=total, loss=text)


class _Rate(ProgressColumn):
    """Steps per second and the time left."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        rate = f"{task.speed:.3g}/s" if task.speed and _counts_steps(task.description) else ""
        return Text(f"{rate:>7} {duration(left) + ' left' if left is not None else '':>11}", style="dim")


def _columns(width: int) -> list[ProgressColumn]:
    what = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    figures: list[ProgressColumn] = [TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[loss]:>10}"), _Rate()]
    return [what, *([BarColumn(bar_width=20)] if width >= _NARROW else []), *figures]


def _tail(name: str) -> str:
    """The end of a name tells layers apart."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def _facts(pairs: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in pairs:
        table.add_row(Text(key, style="dim"), value)
    return table
