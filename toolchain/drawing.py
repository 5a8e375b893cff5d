"""Shapes in pixels from the top left corner, and their SVG; `plot.png` draws the same ones as pixels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

LIGHT: Mapping[str, str] = {
    "ink": "#1c2330", "muted": "#667085", "line": "#d5dae3", "card": "#ffffff", "paper": "#f5f6f8", "blue": "#2f6fd0", "orange": "#d9730d",
    "green": "#1a7f4b", "red": "#c4372b",
}  # fmt: skip
DARK: Mapping[str, str] = {
    "ink": "#e6e9ef", "muted": "#98a2b3", "line": "#39414f", "card": "#1b2029", "paper": "#12151b", "blue": "#6ea8ff", "orange": "#f4a259",
    "green": "#5ecb92", "red": "#ff8a7a",
}  # fmt: skip


def _rule(colors: Mapping[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {value};" for name, value in colors.items()) + " }"


STYLE = f"{_rule(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {_rule(DARK)} }}"
"""The colours as CSS variables."""


@dataclass(frozen=True)
class Box:
    """A rectangle with round corners; colours are names of the palette, and `title` is shown where the mouse rests on it."""

    x: float
    y: float
    width: float
    height: float
    radius: float
    fill: str
    opacity: float = 1.0
    stroke: str | None = None
    thickness: float = 1.0
    is_dashed: bool = False
    title: str = ""

    def svg(self) -> str:
        opacity = f' fill-opacity="{self.opacity:g}"' if self.opacity != 1 else ""
        stroke = f' stroke="var(--{self.stroke})" stroke-width="{self.thickness:g}"' if self.stroke else ""
        dashes = ' stroke-dasharray="3 3"' if self.is_dashed else ""
        return (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="{self.radius:g}" '
            f'fill="var(--{self.fill})"{opacity}{stroke}{dashes}>{_title(self.title)}</rect>'
        )


@dataclass(frozen=True)
class Curve:
    """A straight line through two points, or a Bezier curve through four."""

    points: tuple[tuple[float, float], ...]
    color: str
    title: str = ""

    def svg(self) -> str:
        (x, y), *others = self.points
        path = f"M{x:g} {y:g}{'C' if len(others) == 3 else 'L'}" + ",".join(f"{a:g} {b:g}" for a, b in others)
        return f'<path d="{path}" fill="none" stroke="var(--{self.color})" stroke-width="1.5">{_title(self.title)}</path>'


@dataclass(frozen=True)
class Words:
    """A line of text that starts on its baseline at (x, y)."""

    x: float
    y: float
    text: str
    color: str
    size: float
    is_bold: bool = False

    def svg(self) -> str:
        weight = ' font-weight="600"' if self.is_bold else ""
        return (
            f'<text x="{self.x:g}" y="{self.y:g}" fill="var(--{self.color})" font-size="{self.size:g}"{weight} pointer-events="none">'
            f"{escape(self.text)}</text>"
        )


Shape = Box | Curve | Words


@dataclass(frozen=True)
class Drawing:
    """Shapes one over the other on a ground of this size."""

    width: float
    height: float
    description: str
    shapes: Sequence[Shape]

    def svg(self) -> str:
        """As SVG for a page, which brings the colours."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self.description)}" '
            f'xmlns="http://www.w3.org/2000/svg">{"".join(shape.svg() for shape in self.shapes)}</svg>'
        )


def standalone(svg: str, ground: str = "paper", scale: float = 1.0) -> str:
    """An SVG of a page as a file of its own: with the colours that the page brings, a background of this colour, and a size."""
    opening = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert opening is not None
    width, height = map(float, opening.groups())
    head = svg[: svg.index(">") + 1]
    style = f"<style>{STYLE} text {{ font-family: system-ui, sans-serif }}</style>"
    back = f'<rect width="{width:g}" height="{height:g}" fill="var(--{ground})"/>'
    sized = f'{opening[0]} width="{scale * width:g}" height="{scale * height:g}"'
    return sized + head[opening.end() :] + style + back + svg[len(head) :] + "\n"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
