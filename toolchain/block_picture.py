"""The blocks of a model as an SVG: one row each from the input down, units as frames, capacities as bars, values that skip rows as arcs."""

import math
from collections import Counter
from html import escape
from typing import Any

from .wording import kind, magnitude

_WIDTH, _ROW, _BOX = 340, 46, 34
_LEFT, _TEXT = 34, 44
_BARS = 262  # where the capacity bars start; they end at the right edge
STYLE = """:root { --ink: #1c2330; --muted: #667085; --line: #d5dae3; --card: #ffffff; --paper: #f5f6f8; --blue: #2f6fd0; --orange: #d9730d;
  --green: #1a7f4b; --red: #c4372b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --muted: #98a2b3; --line: #39414f; --card: #1b2029; --paper: #12151b;
  --blue: #6ea8ff; --orange: #f4a259; --green: #5ecb92; --red: #ff8a7a; } }"""


def block_picture(plan: dict[str, Any], standalone: bool = False) -> str:
    """Draw the blocks of a `report.plan_report`.

    Args:
        plan: the facts.
        standalone: for a file of its own: with the colours that a page would bring, and a background.
    """
    blocks = plan["blocks"]
    unit_of = {part: unit for unit in plan["plan"]["units"] for part in unit.split("+")}
    largest = max((math.log10(1 + block["capacity"]) for block in blocks), default=1.0) or 1.0
    top = {block["name"]: 24 + index * _ROW for index, block in enumerate(blocks)}
    height = 24 + len(blocks) * _ROW + 4
    parts = [_text(_TEXT, 14, "block and its operators", "muted", 10), _text(_BARS, 14, "capacity", "muted", 10)]
    parts += _arcs(blocks, top)
    for unit in plan["plan"]["units"]:
        names = unit.split("+")
        if len(names) > 1 and all(name in top for name in names):
            y, bottom = top[names[0]] - 3, top[names[-1]] + _BOX + 3
            parts.append(
                f'<rect x="{_LEFT - 5}" y="{y}" width="{_WIDTH - _LEFT + 3}" height="{bottom - y}" rx="9" fill="var(--blue)" '
                f'fill-opacity="0.1" stroke="var(--blue)" stroke-width="1.5"><title>one unit: {escape(unit)}</title></rect>'
            )
    for block in blocks:
        parts.append(_row(block, top[block["name"]], math.log10(1 + block["capacity"]) / largest, unit_of[block["name"]]))
    style = f"<style>{STYLE} text {{ font-family: system-ui, sans-serif }}</style>" if standalone else ""
    ground = f'<rect width="{_WIDTH}" height="{height}" fill="var(--paper)"/>' if standalone else ""
    size = f' width="{_WIDTH * 2}" height="{height * 2}"' if standalone else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}"{size} role="img" aria-label="blocks and units" xmlns="http://www.w3.org/2000/svg">'
        f"{style}{ground}{''.join(parts)}</svg>"
    )


def _row(block: dict[str, Any], y: int, share: float, unit: str) -> str:
    stroke = "var(--orange)" if block["opens_stage"] and block["layers"] else "var(--line)"
    dashes = "" if block["layers"] and not block["is_island"] else ' stroke-dasharray="3 3"'
    capacity = magnitude(block["capacity"])
    details = (
        f"{block['name']}: {kind(block)}, {block['weights']:,} weights, capacity {block['capacity']:.4g}, unit {unit}; {block['last_node']}"
    )
    return (
        f'<g><title>{escape(details)}</title><rect x="{_LEFT}" y="{y}" width="{_BARS - _LEFT - 10}" height="{_BOX}" rx="6" '
        f'fill="var(--card)" stroke="{stroke}"{dashes}/>'
        f"{_text(_TEXT, y + 14, block['name'], 'ink', 11, weight=600)}"
        f"{_text(_TEXT + 34, y + 14, kind(block) + (', opens a stage' if block['opens_stage'] and block['layers'] else ''), 'muted', 10)}"
        f"{_text(_TEXT, y + 27, _operators(block['operators']), 'muted', 10)}"
        f'<rect x="{_BARS}" y="{y + 6}" width="{max((_WIDTH - _BARS - 6) * share, 1):.1f}" height="9" rx="2" fill="var(--blue)"/>'
        f"{_text(_BARS, y + 27, capacity, 'muted', 10)}</g>"
    )


def _operators(kinds: list[str], room: int = 34) -> str:
    """`3 Conv, 2 Clip, Add`, in order of first use, cut to fit."""
    counted = ", ".join(f"{count} {name}" if count > 1 else name for name, count in Counter(kinds).items())
    return counted if len(counted) <= room else counted[: room - 1] + "…"


def _arcs(blocks: list[dict[str, Any]], top: dict[str, int]) -> list[str]:
    """A line from each block to the reader of its output: straight to the next row, in an arc to a later one."""
    maker = {value: block["name"] for block in blocks for value in block["outputs"]}
    order = {block["name"]: index for index, block in enumerate(blocks)}
    lines = []
    for block in blocks:
        for value in block["inputs"]:
            source = maker.get(value)
            if source is None:
                continue
            start, end = top[source] + _BOX, top[block["name"]]
            distance = order[block["name"]] - order[source]
            x = _LEFT + 16
            if distance == 1:
                path = f"M{x} {start}V{end}"
            else:
                start, end, depth = start - _BOX // 2, end + _BOX // 2, min(8 + 4 * distance, 30)
                path = f"M{_LEFT} {start}C{_LEFT - depth} {start},{_LEFT - depth} {end},{_LEFT} {end}"
            title = f"<title>{escape(value)}: {source} to {block['name']}</title>"
            lines.append(f'<path d="{path}" fill="none" stroke="var(--muted)" stroke-width="1.5">{title}</path>')
    return lines


def _text(x: float, y: float, text: str, color: str, size: int, weight: int = 400) -> str:
    return f'<text x="{x}" y="{y}" fill="var(--{color})" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
