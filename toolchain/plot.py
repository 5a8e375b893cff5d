"""Inline SVG from matplotlib: text stays text, colours are the page's CSS variables, so one picture serves light and dark, and print.

Each picture is drawn for a wide and for a narrow screen, and the page's style sheet shows the one that fits: scaling a wide picture down
to a phone would make its text unreadable.
"""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.transforms import blended_transform_factory

from .drawing import LIGHT, Box, Curve, Drawing, standalone

# Stand-ins that matplotlib can parse, and the variable that takes each one's place.
INK, MUTED, LINE, PAPER = "#010100", "#010200", "#010300", "#010400"
BLUE, ORANGE, GREEN, RED = "#010500", "#010600", "#010700", "#010800"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--card",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", RED: "--red",
}  # fmt: skip
WIDE, NARROW = 860, 340  # pixels
_HIGHEST = 30_000  # pixels of a file, which viewers still open
_RIGHT = 14  # pixels beside the axes: half of the last tick's label
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

Draw = Callable[[Axes], None]


def picture(name: str, description: str, draw: Draw, height: int = 300) -> str:
    """A picture for both widths, as HTML.

    Args:
        name: unique on the page; element ids are derived from it.
        description: what is to be seen, for those who cannot see it.
        draw: draws on the axes; `is_narrow` tells for which width.
        height: of the picture in pixels.
    """
    wide, narrow = (svg(f"{name}-{kind}", description, draw, width, height) for kind, width in (("w", WIDE), ("n", NARROW)))
    return f'<figure class="plot" id="{name}"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def pictures(page: str) -> dict[str, str]:
    """The pictures of a page by name, each as an SVG file of its own, as wide screens show them."""
    found = re.finditer(r'<figure class="plot" id="([^"]+)"><div class="wide">(.*?)</div>', page, flags=re.DOTALL)
    return {match[1]: standalone(match[2], "card") for match in found}


def svg(name: str, description: str, draw: Draw, width: int, height: int, margins: tuple[int, int] | None = None) -> str:
    """One picture of a fixed size in pixels; equal arguments give equal bytes.

    `margins` left and below the axes spare the search for a layout, which takes longer than all else.
    """
    with matplotlib.rc_context(_STYLE), matplotlib.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), layout=None if margins else "constrained")
        if margins:
            left, bottom = margins
            axes = figure.add_axes((left / width, bottom / height, 1 - (left + _RIGHT) / width, 1 - (bottom + 4) / height))
        else:
            axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inlined(buffer.getvalue(), name, description)


def png(drawing: Drawing) -> bytes:
    """A drawing in light colours, at three times its size where that is not too high; equal drawings give equal bytes."""
    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=min(3 * 72, _HIGHEST * 72 / drawing.height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            box = FancyBboxPatch(
                (shape.x, shape.y),
                shape.width,
                shape.height,
                boxstyle=f"round,pad=0,rounding_size={min(shape.radius, shape.width / 2)}",
                facecolor=(LIGHT[shape.fill], shape.opacity),
                edgecolor=LIGHT[shape.stroke] if shape.stroke else "none",
                linewidth=shape.thickness if shape.stroke else 0,
                linestyle=(0, (3, 3)) if shape.is_dashed else "solid",
            )
            axes.add_patch(box)
        elif isinstance(shape, Curve):
            code = Path.CURVE4 if len(shape.points) == 4 else Path.LINETO
            path = Path(shape.points, [Path.MOVETO] + [code] * (len(shape.points) - 1))
            axes.add_patch(PathPatch(path, facecolor="none", edgecolor=LIGHT[shape.color], linewidth=1.5))
        else:
            weight = "bold" if shape.is_bold else "normal"
            # Bold and regular letters of the font that matplotlib brings are a tenth wider than those that pages are laid out for.
            axes.text(shape.x, shape.y, shape.text, color=LIGHT[shape.color], fontsize=0.9 * shape.size, weight=weight, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", facecolor=LIGHT["paper"], metadata={"Software": None})
    return buffer.getvalue()


def is_narrow(axes: Axes) -> bool:
    """Whether a picture is drawn for a phone."""
    return axes.figure.get_figwidth() * 72 < WIDE / 2  # pyright: ignore[reportAttributeAccessIssue]


def name_ticks(axes: Axes, names: list[str]) -> None:
    """Names along the x axis, turned where they would touch and thinned out where they would still."""
    room = 26 if is_narrow(axes) else 60
    every = max(1, -(-len(names) // room))
    shown = range(0, len(names), every)
    longest = max(map(len, names), default=0)
    turned = len(shown) * longest * 7 > (300 if is_narrow(axes) else 780)
    axes.set_xticks(list(shown), [names[i] for i in shown], rotation=90 if turned else 0)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)


def spans(axes: Axes, runs: list[tuple[int, int]]) -> None:
    """Shade runs of positions [first, last] that belong together."""
    for first, last in runs:
        axes.axvspan(first - 0.42, last + 0.42, color=BLUE, alpha=0.1, linewidth=0)


def mark(axes: Axes, x: float, text: str, color: str = MUTED) -> None:
    """A vertical line with a word on top."""
    axes.axvline(x, color=color, linewidth=1, linestyle=(0, (3, 3)))
    place = blended_transform_factory(axes.transData, axes.transAxes)
    axes.annotate(text, (x, 1.0), (4, 0), xycoords=place, textcoords="offset points", color=color, fontsize=9, va="top")


def _inlined(text: str, name: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    referenced = set(re.findall(r"#([\w-]+)", text))
    prefix = re.sub(r"\W+", "-", name)

    def identified(found: re.Match[str]) -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in referenced else ""

    text = re.sub(r'\sid="([^"]*)"', identified, text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg"'
    opening += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    text = re.sub(r"<svg\b[^>]*>", lambda _: opening, text, count=1, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", text).strip()
