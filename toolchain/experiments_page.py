"""The page of `compare` and `study`: what either said of the runs in one results file, drawn from that file alone."""

from collections.abc import Callable
from html import escape
from typing import Any

from . import figures
from .document import document, section, table
from .wording import behind


def experiments_page(facts: dict[str, Any]) -> str:
    """The page of `compare` and `study`: what either said of the runs in one results file."""
    title = f"{facts['model'].replace(chr(92), '/').rsplit('/', 1)[-1]}: experiments"
    environment = facts["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("mrecg-onnx", "torch") if name in environment["versions"])
    text = f"Every run on equal samples, measured from its exported file; {environment['gpu'] or environment['processor']}, {versions}."
    sections = [*_comparison(facts["comparison"])] if "comparison" in facts else []
    sections += _study(facts["study"]) if "study" in facts else []
    return document(title, f"<h1>{escape(title)}</h1><p class=muted>{escape(text)}</p>", sections)


def _terms(facts: dict[str, Any]) -> str:
    """On what an experiment's runs were made."""
    known = "no labels" if facts["top1_float"] is None else f"float top-1 {facts['top1_float']:.2f} %"
    text = f"{facts['runs']} runs of {facts['iterations']:,} iterations a unit, batch {facts['batch_size']}, "
    text += f"{facts['calibration_samples']:,} calibration and {facts['samples']:,} evaluation samples ({known})."
    return escape(text + "".join(f" Calibration: {note}." for note in facts["notes"]))


def _comparison(facts: dict[str, Any]) -> list[str]:
    """A section for each precision."""
    lines = facts["lines"]
    text = (
        f"{_terms(facts)} Dots are means over seeds, bars one standard deviation; without bars there was one seed. Behind: points behind "
        "the best, and half the 95 % interval of that over the samples; a method within it is not told apart from the best."
    )
    sections = []
    for precision in dict.fromkeys(line["precision"] for line in lines):
        own = [line for line in lines if line["precision"] == precision]
        keys = [key for key in ("top1", "agreement", "sqnr") if any(line[key] is not None for line in own)]
        rows = [
            (
                line["method"],
                str(line["seeds"]),
                *(_mean(line, key) for key in ("top1", "agreement", "sqnr")),
                behind(line),
                _mean(line, "units_after"),
                f"{line['unit_count']:.0f}",
                f"{line['seconds']:.0f}",
            )
            for line in own
        ]
        columns = (
            "method", "seeds>", "top-1 %>", "agreement %>", "SQNR dB>", "behind>", "oscillation>", "units>", "seconds>"
        )  # fmt: skip
        parts = [figures.comparison(lines, precision, key) for key in keys[:2] or keys]
        sections.append(section(f"Methods at {precision.upper()}", text, *parts, table(columns, rows)))
    return sections


def _study(facts: dict[str, Any]) -> list[str]:
    """A section for each claim."""
    drawn: dict[str, Callable[[dict[str, Any]], str]] = {
        "oscillation": lambda finding: figures.loss_lines(finding["lines"]),
        "final-error": lambda finding: figures.scatter("final-error", finding),
        "accuracy": lambda finding: figures.scatter("accuracy", finding),
        "data": figures.data_series,
        "theorem": lambda finding: figures.neighbours(finding) if finding["pairs"] else "",
    }
    words = {True: "holds", False: "does not hold", None: "undecided"}
    classes = {True: "yes", False: "no", None: "unclear"}
    head = (
        f"<h2>The claims behind MRECG at {escape(facts['precision'].upper())}</h2><p class=muted>{_terms(facts)} Random unit schemes and "
    )
    head += f"data: {escape(facts['algorithm'])}.</p>"
    return [
        f"<section>{head}</section>",
        *(
            f'<section class="verdict {classes[finding["holds"]]}"><h2>{escape(finding["claim"][:1].upper() + finding["claim"][1:])}</h2>'
            f"<p><b>{words[finding['holds']]}</b> {escape(finding['verdict'])}</p>{drawn[name](finding)}</section>"
            for name, finding in facts["findings"].items()
        ),
    ]


def _mean(line: dict[str, Any], key: str) -> str:
    value, spread = line[key], line[f"{key}_spread"]
    if value is None:
        return ""
    form = ".3g" if key == "units_after" else ".2f"
    return f"{value:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")
