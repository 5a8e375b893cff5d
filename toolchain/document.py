"""The parts that every page is made of: the document around sections, tables, folded details, small pictures under one key."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from .drawing import STYLE

_SHORT = 16  # characters of a first cell that need no room of their own to break in


def document(title: str, head: str, sections: Sequence[str]) -> str:
    """A page around sections."""
    css = STYLE + resources.files("toolchain").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n<body><main>\n{head}\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, text: str, *parts: str) -> str:
    """A titled section; `text` is a sentence on what is shown."""
    return f"<section><h2>{escape(title)}</h2><p class=muted>{text}</p>{''.join(parts)}</section>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; columns whose name ends in > hold numbers."""
    classes = [" class=number" if column.endswith(">") else "" for column in columns]
    head = "".join(f"<th{c}>{escape(column.removesuffix('>'))}</th>" for column, c in zip(columns, classes, strict=True))
    body = "".join(f"<tr>{''.join(f'<td{c}>{escape(cell)}</td>' for cell, c in zip(row, classes, strict=True))}</tr>" for row in rows)
    named = " class=named" if any(len(row[0]) > _SHORT for row in rows) else ""
    return f"<div class=scroll><table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def details(title: str, body: str) -> str:
    """What is shown on request."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def keys(legend: Iterable[tuple[str, str]]) -> str:
    """Colours and what they stand for."""
    items = [f'<span><i style="background:var({color})"></i>{escape(text)}</span>' for color, text in legend]
    return f"<div class=keys>{''.join(items)}</div>"


def multiples(legend: Iterable[tuple[str, str]], pictures: Iterable[tuple[str, str, str]]) -> str:
    """Small pictures side by side under one key: a title, what is said of it, and the drawing of each."""
    items = "".join(f"<div class=multiple><h3>{escape(title)}</h3><small>{text}</small>{drawn}</div>" for title, text, drawn in pictures)
    return f"{keys(legend)}<div class=multiples>{items}</div>"
