"""The pictures of a run: each is a pure function of the facts of `report`."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from . import plot
from .plot import BLUE, GREEN, INK, LINE, MUTED, ORANGE, RED
from .wording import short_names

_LOG_RATIO = 40.0  # from which a quantity is drawn on a logarithmic axis
_MOST_LEVELS = 40  # of a grid that are drawn one by one
_MOST_LAYERS = 30  # in the picture of the sensitivity


def losses(report: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    """Loss of the calibrated blocks, and of the units before and after reconstruction; `baseline` is another run's report to overlay."""
    names = [block["name"] for block in report["blocks"]]
    places = _places(report)
    calibrated = [(i, block["loss"]) for i, block in enumerate(report["blocks"]) if block["loss"]]

    def draw(axes: Axes) -> None:
        plot.spans(axes, [place for place in places.values() if place[0] < place[1]])
        if calibrated:
            axes.plot(*zip(*calibrated, strict=True), color=MUTED, marker="o", markersize=4, linewidth=1, label="calibrated, by block")
        if baseline is not None:
            rows = [(_last(report, unit["unit"]), final(unit)) for unit in baseline["units"]]
            rows = [(place, loss) for place, loss in rows if place is not None]
            if rows:
                label = f"reconstructed, units {baseline['config']['units']}"
                axes.plot(*zip(*rows, strict=True), color=GREEN, marker="s", markersize=4, linewidth=1.2, label=label)
        for unit in report["units"]:
            first, last = places[unit["unit"]]
            x = (first - 0.36, last + 0.36)
            axes.plot(x, [unit["loss_before"]] * 2, color=BLUE, linewidth=2, solid_capstyle="butt")
            axes.plot(x, [final(unit)] * 2, color=ORANGE, linewidth=3.4, solid_capstyle="butt")
        ends = [(places[unit["unit"]][1], final(unit)) for unit in report["units"]]
        if ends:
            axes.plot(*zip(*ends, strict=True), color=ORANGE, linewidth=1, marker="o", markersize=3)
        handles, labels = axes.get_legend_handles_labels()
        handles += [Line2D([], [], color=BLUE, linewidth=2), Line2D([], [], color=ORANGE, linewidth=3.4)]
        axes.set_ylabel("reconstruction loss")
        _scale(axes, [loss for _, loss in calibrated] + [loss for _, loss in ends])
        plot.name_ticks(axes, names)
        columns = 1 if plot.is_narrow(axes) else 4
        _legend(axes, handles, [*labels, "unit before", "unit reconstructed"], columns)

    return plot.picture("losses", "reconstruction loss along the network", draw, 340)


def capacities(report: dict[str, Any]) -> str:
    """Capacity of each block, with the units shaded."""
    blocks = report["blocks"]
    places = _places(report)

    def draw(axes: Axes) -> None:
        plot.spans(axes, [place for place in places.values() if place[0] < place[1]])
        colors = [ORANGE if block["opens_stage"] else BLUE for block in blocks]
        axes.bar(range(len(blocks)), [block["capacity"] for block in blocks], color=colors, width=0.6)
        axes.set_ylabel("ModCap")
        _scale(axes, [block["capacity"] for block in blocks if block["capacity"] > 0])
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        plot.name_ticks(axes, [block["name"] for block in blocks])
        handles = [Line2D([], [], color=color, linewidth=6) for color in (BLUE, ORANGE)]
        _legend(axes, handles, ["block", "block that opens a stage"], 2)

    return plot.picture("capacities", "capacity of each block", draw, 260)


CURVES = {"loss": ORANGE, "regulariser": BLUE, "beta": MUTED, "decided": GREEN}
"""What a unit's curve consists of, and its colours."""


def curve(position: int, unit: dict[str, Any]) -> str:
    """The optimisation of one unit: each quantity as a share of its largest value."""
    points = unit["curve"]

    def draw(axes: Axes) -> None:
        for key, color in CURVES.items():
            values = [math.nan if value is None else value for value in points[key]]
            largest = 1.0 if key == "decided" else max((v for v in values if v == v), default=0.0)
            if largest > 0:
                axes.plot(points["iteration"], [v / largest for v in values], color=color, linewidth=1.0 if key == "beta" else 1.6)
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1], ["0", "", "max"])
        axes.margins(x=0.01)
        axes.locator_params(axis="x", nbins=4)

    return plot.svg(f"curve{position}", f"optimisation of unit {unit['unit']}", draw, 270, 120, margins=(30, 18))


def histogram(position: int, value: dict[str, Any]) -> str:
    """The values of a tensor and the grid they are rounded to."""
    low, high, counts = value["low"], value["high"], value["counts"]
    first, last, step = value["grid"]
    width = (high - low) / len(counts)

    def draw(axes: Axes) -> None:
        edges = [low + i * width for i in range(len(counts) + 1)]
        inside = [first - step / 2 <= edge + width / 2 <= last + step / 2 for edge in edges[:-1]]
        for color, chosen in ((BLUE, True), (RED, False)):
            axes.stairs([n if fits is chosen else 0 for n, fits in zip(counts, inside, strict=True)], edges, fill=True, color=color)
        axes.axvspan(max(first - step / 2, low), min(last + step / 2, high), color=GREEN, alpha=0.1, linewidth=0)
        levels = round((last - first) / step) + 1
        if levels <= _MOST_LEVELS:
            axes.vlines([first + level * step for level in range(levels)], 0.5, max(counts), color=GREEN, linewidth=0.8, alpha=0.8)
        axes.set_yscale("log")
        axes.set_yticks([])
        axes.minorticks_off()
        axes.set_ylim(0.5, max(counts) * 1.5)
        axes.set_xlim(
            min(low, first - step / 2) if levels <= _MOST_LEVELS else low, max(high, last + step / 2 if levels <= _MOST_LEVELS else high)
        )
        axes.locator_params(axis="x", nbins=5)

    return plot.svg(f"histogram{position}", f"histogram of {value['name']}", draw, 270, 120, margins=(14, 18))


def sensitivities(found: dict[str, Any]) -> str:
    """The layers that hurt most: the output when only they are quantized, and what leaving only them float gains."""
    layers = sorted(found["layers"], key=lambda row: row["only_quantized"] if row["only_quantized"] is not None else math.inf)[
        :_MOST_LAYERS
    ]
    whole = found["all_quantized"]

    def draw(axes: Axes) -> None:
        rows = range(len(layers))
        for y, layer in zip(rows, layers, strict=True):
            ends = [v for v in (layer["only_float"], layer["only_quantized"]) if v is not None]
            axes.plot(ends, [y] * len(ends), color=LINE, linewidth=1)
        for key, color, label in (("only_quantized", BLUE, "only this layer quantized"), ("only_float", ORANGE, "only this layer float")):
            points = [(layer[key], y) for y, layer in zip(rows, layers, strict=True) if layer[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linewidth=0, label=label)
        room = 18 if plot.is_narrow(axes) else 52
        axes.set_yticks(list(rows), short_names([layer["node"] for layer in layers], room))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(layers) - 0.4, -2.0)  # room for the word on top of the line
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("SQNR of the output, dB")
        if whole is not None:
            plot.mark(axes, whole, "all quantized", INK)
        _legend(axes, *axes.get_legend_handles_labels(), 1 if plot.is_narrow(axes) else 2)

    return plot.picture("sensitivity", "sensitivity of the layers", draw, 90 + 15 * len(layers))


def comparison(lines: list[dict[str, Any]], precision: str, key: str) -> str:
    """One measure of each method at one precision, with the spread over seeds."""
    chosen = [line for line in lines if line["precision"] == precision and line[key] is not None]

    def draw(axes: Axes) -> None:
        for y, line in enumerate(chosen):
            axes.errorbar(line[key], y, xerr=line[f"{key}_spread"], color=BLUE, marker="o", markersize=6, capsize=4, linewidth=1.6)
        axes.set_yticks(range(len(chosen)), [line["method"] for line in chosen])
        axes.set_ylim(len(chosen) - 0.5, -1.2)  # room for the word on top of the line
        if key == "top1":
            plot.mark(axes, chosen[0]["top1_float"], "float", INK)
            axes.margins(x=0.08)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(
            {"top1": "top-1 accuracy, %", "agreement": "agreement with the float model, %", "sqnr": "SQNR of the output, dB"}[key]
        )

    return plot.picture(f"{precision}-{key}", f"{key} of the methods at {precision}", draw, 96 + 24 * len(chosen))


def loss_lines(lines: list[dict[str, Any]]) -> str:
    """Loss along the network for several methods whose units differ: each at the end of its unit."""

    def draw(axes: Axes) -> None:
        for line, color, width in zip(lines, (MUTED, BLUE, ORANGE), (1.2, 3.6, 1.6), strict=False):  # seen where another lies over it
            axes.plot(line["places"], line["losses"], color=color, linewidth=width, marker="o", markersize=2 + width, label=line["method"])
        axes.set_xlabel("share of the network's blocks (of its layers for adaround)")
        axes.set_ylabel("reconstruction loss")
        _scale(axes, [loss for line in lines for loss in line["losses"]])
        _legend(axes, *axes.get_legend_handles_labels(), 3)

    return plot.picture("oscillation", "loss along the network by method", draw, 320)


def scatter(name: str, finding: dict[str, Any]) -> str:
    """One point for each random unit scheme."""

    def draw(axes: Axes) -> None:
        if finding["points"]:
            axes.plot(*zip(*finding["points"], strict=True), color=BLUE, marker="o", markersize=6, linewidth=0, alpha=0.8)
        axes.set_xlabel(finding["x"])
        axes.set_ylabel(finding["y"])

    return plot.picture(name, f"{finding['y']} against {finding['x']}", draw, 300)


def data_series(finding: dict[str, Any]) -> str:
    """Accuracy against batch size and sample count; bars are half the 95 % intervals of the differences from the last run."""
    parts = []
    for name, points in finding["series"].items():

        def draw(axes: Axes, name: str = name, points: Sequence[Sequence[float]] = points) -> None:
            sizes, accuracies, margins = zip(*points, strict=True)
            axes.errorbar(sizes, accuracies, yerr=[*margins[:-1], 0.0], color=BLUE, marker="o", markersize=6, capsize=4, linewidth=1.6)
            axes.set_xscale("log", base=2)
            axes.set_xticks([p[0] for p in points], [str(p[0]) for p in points])
            axes.minorticks_off()
            axes.set_xlabel(name)
            axes.set_ylabel("top-1 accuracy, %" if finding["metric"] == "top1" else "agreement, %")

        parts.append(plot.picture(f"data-{name.replace(' ', '-')}", f"accuracy against {name}", draw, 240))
    return "".join(parts) + "<p class=muted>Bars: half the 95 % interval of the difference from the last point, over the samples.</p>"


def neighbours(finding: dict[str, Any]) -> str:
    """The loss of each pair of equivalent neighbours: where it rises and where it falls."""

    def draw(axes: Axes) -> None:
        for x, pair in enumerate(finding["pairs"]):
            color = BLUE if pair["rises"] else RED
            axes.plot((x - 0.25, x + 0.25), pair["losses"], color=color, marker="o", markersize=4)
        plot.name_ticks(axes, ["|".join(pair["blocks"]) for pair in finding["pairs"]])
        axes.set_ylabel("reconstruction loss")
        _legend(axes, [Line2D([], [], color=color) for color in (BLUE, RED)], ["rises", "falls"], 2)

    return plot.picture("theorem", "loss between equivalent neighbours", draw, 280)


def _places(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """First and last block of each unit."""
    position = {block["name"]: index for index, block in enumerate(report["blocks"])}
    parts = {unit: unit.split("+") for unit in report["plan"]["units"]}
    return {unit: (position[names[0]], position[names[-1]]) for unit, names in parts.items()}


def _last(report: dict[str, Any], unit: str) -> int | None:
    """The position of another run's unit among the blocks of this one."""
    return next((i for i, block in enumerate(report["blocks"]) if block["name"] == unit.split("+")[-1]), None)


def final(unit: dict[str, Any]) -> float:
    """The loss of what is in the table; NaN where neither is a finite number."""
    return min((loss for loss in (unit["loss_before"], unit["loss_after"]) if loss is not None), default=math.nan)


def _scale(axes: Axes, values: Sequence[float | None]) -> None:
    positive = [value for value in values if value is not None and value > 0]  # None: no finite number
    if positive and max(positive) > _LOG_RATIO * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.4)
