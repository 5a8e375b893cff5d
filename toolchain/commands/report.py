"""`mrecg-onnx report`: the page of a run or of experiments, drawn again from the facts."""

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .endings import reported
from .options import EXIT_CODES, PATH


@click.command("report", epilog=EXIT_CODES, short_help="Draw a page again, or two runs over each other.")
@click.argument("report_file", metavar="REPORT.json", type=PATH)
@click.option("--overlay", type=PATH, metavar="OTHER.json", help="Report of another run of the same model, whose losses are drawn too.")
@click.option("-o", "--output", type=PATH, help="The page. Default: beside REPORT.json, ending in .html.")
@click.option("--figures", type=PATH, metavar="FOLDER", help="Write each figure of the page as an SVG file there too.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def report_command(report_file: Path, overlay: Path | None, output: Path | None, figures: Path | None, verbose: bool) -> None:
    """Draw a page again from REPORT.json: that of a `quantize` run, alone or with another run's losses over it, or the results file of
    `compare` and `study`.

    \b
    mrecg-onnx quantize net.onnx --units none -o plain.onnx ...
    mrecg-onnx quantize net.onnx --units loss -o joined.onnx ...
    mrecg-onnx report joined.report/report.json --overlay plain.report/report.json
    mrecg-onnx report study.json --figures pictures/
    """
    with reported(verbose):
        from .. import comparison, plot, report
        from ..experiments_page import experiments_page
        from ..page import report_page

        if figures is not None and not figures.is_dir():
            raise UsageError(f"--figures {figures}: the folder does not exist")
        found = report.load_json(report_file)
        of_experiments = comparison.are_results(found)
        if of_experiments and overlay is not None:
            raise UsageError(f"--overlay: lies over the page of a `quantize` run; {report_file} is of `compare` or `study`")
        if of_experiments and not found.keys() & {"comparison", "study"}:
            raise UsageError(f"{report_file}: is of runs that did not end; the same `compare` or `study` goes on from there")
        try:
            page = experiments_page(found) if of_experiments else report_page(*_runs(report_file, overlay))
        except KeyError as missing:
            raise UsageError(f"{report_file}: has no {missing}: it was written by another version of mrecg-onnx") from missing
        place = output or report_file.with_suffix(".html")
        report.write_text(place, page)
        click.echo(f"wrote {place}")
        if figures is not None:
            drawn = plot.pictures(page)
            for name, svg in drawn.items():
                report.write_text(figures / f"{report_file.stem}-{name}.svg", svg)
            click.echo(f"wrote {len(drawn)} figures to {figures}")


def _runs(report_file: Path, overlay: Path | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The facts of a run, and of the one that is drawn over it."""
    from .. import report

    facts, other = report.load_report(report_file), report.load_report(overlay) if overlay is not None else None
    if other is not None and other["model"]["sha256"] != facts["model"]["sha256"]:
        raise UsageError(f"--overlay {overlay}: is of another model ({other['model']['path']}, not {facts['model']['path']})")
    return facts, other
