"""The blocks of a model as a picture: a row each from the input down, units as frames, capacities as bars, values past rows as arcs."""

import math
from collections import Counter
from typing import Any

from .drawing import Box, Curve, Drawing, Shape, Words
from .wording import kind, magnitude

_WIDTH, _ROW, _BOX = 340, 46, 34
_LEFT, _TEXT = 34, 44
_BARS = 262  # where the capacity bars start; they end at the right edge
_TOP = 24


def block_picture(plan: dict[str, Any]) -> Drawing:
    """Draw the blocks of a `report.plan_report`."""
    blocks = plan["blocks"]
    unit_of = {part: unit for unit in plan["plan"]["units"] for part in unit.split("+")}
    largest = max((math.log10(1 + block["capacity"]) for block in blocks), default=1.0) or 1.0
    top = {block["name"]: _TOP + index * _ROW for index, block in enumerate(blocks)}
    shapes: list[Shape] = [Words(_TEXT, 14, "block and its operators", "muted", 10), Words(_BARS, 14, "capacity", "muted", 10)]
    shapes += _arcs(blocks, top)
    for unit in plan["plan"]["units"]:
        names = unit.split("+")
        if len(names) > 1 and all(name in top for name in names):
            y, bottom = top[names[0]] - 3, top[names[-1]] + _BOX + 3
            shapes.append(
                Box(_LEFT - 5, y, _WIDTH - _LEFT + 3, bottom - y, 9, "blue", 0.1, "blue", thickness=1.5, title=f"one unit: {unit}")
            )
    for block in blocks:
        shapes += _row(block, top[block["name"]], math.log10(1 + block["capacity"]) / largest, unit_of[block["name"]])
    return Drawing(_WIDTH, _TOP + len(blocks) * _ROW + 4, "blocks and units", shapes)


def _row(block: dict[str, Any], y: int, share: float, unit: str) -> list[Shape]:
    opens = block["opens_stage"] and block["layers"]
    title = (
        f"{block['name']}: {kind(block)}, {block['weights']:,} weights, capacity {block['capacity']:.4g}, unit {unit}; {block['last_node']}"
    )
    is_dashed = block["is_island"] or not block["layers"]
    return [
        Box(_LEFT, y, _BARS - _LEFT - 10, _BOX, 6, "card", 1.0, "orange" if opens else "line", is_dashed=is_dashed, title=title),
        Words(_TEXT, y + 14, block["name"], "ink", 11, is_bold=True),
        Words(_TEXT + 34, y + 14, kind(block) + (", opens a stage" if opens else ""), "muted", 10),
        Words(_TEXT, y + 27, _operators(block["operators"]), "muted", 10),
        Box(_BARS, y + 6, round(max((_WIDTH - _BARS - 6) * share, 1), 1), 9, 2, "blue", title=title),
        Words(_BARS, y + 27, magnitude(block["capacity"]), "muted", 10),
    ]


def _operators(kinds: list[str], room: int = 36) -> str:
    """`3 Conv, 2 Clip, Add`, in order of first use, cut to fit."""
    counted = ", ".join(f"{count} {name}" if count > 1 else name for name, count in Counter(kinds).items())
    if len(counted) <= room:
        return counted
    whole = counted[: room - 2].rpartition(", ")[0]
    return f"{whole}, …" if whole else counted[: room - 1] + "…"


def _arcs(blocks: list[dict[str, Any]], top: dict[str, int]) -> list[Shape]:
    """A line from each block to the reader of its output: straight to the next row, in an arc to a later one."""
    maker = {value: block["name"] for block in blocks for value in block["outputs"]}
    order = {block["name"]: index for index, block in enumerate(blocks)}
    lines: list[Shape] = []
    for block in blocks:
        for value in block["inputs"]:
            source = maker.get(value)
            if source is None:
                continue
            start, end = top[source] + _BOX, top[block["name"]]
            distance = order[block["name"]] - order[source]
            x = _LEFT + 16
            points = ((x, start), (x, end))
            if distance > 1:
                start, end, depth = start - _BOX // 2, end + _BOX // 2, min(8 + 4 * distance, 30)
                points = ((_LEFT, start), (_LEFT - depth, start), (_LEFT - depth, end), (_LEFT, end))
            lines.append(Curve(points, "muted", f"{value}: {source} to {block['name']}"))
    return lines
