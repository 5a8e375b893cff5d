"""`mrecg-onnx report`: the page of a run or of experiments, drawn again from the facts."""

from pathlib import Path

import click

from ..errors import UsageError
from .endings import reported
from .options import EXIT_CODES, PATH


@click.command("report", epilog=EXIT_CODES, short_help="Draw a page again, or two runs over each other.")
@click.argument("report_file", metavar="REPORT.json", type=PATH)
@click.option("--overlay", type=PATH, metavar="OTHER.json", help="Report of another run of the same model, whose losses are drawn too.")
@click.option("-o", "--output", type=PATH, help="The page. Default: beside REPORT.json, ending in .html.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def report_command(report_file: Path, overlay: Path | None, output: Path | None, verbose: bool) -> None:
    """Draw a page again from REPORT.json: that of a `quantize` run, alone or with another run's losses over it, or the results file of
    `compare` and `study`.

    \b
    mrecg-onnx quantize net.onnx --units none -o plain.onnx ...
    mrecg-onnx quantize net.onnx --units loss -o joined.onnx ...
    mrecg-onnx report joined.report/report.json --overlay plain.report/report.json
    """
    with reported(verbose):
        from .. import report
        from ..experiments_page import experiments_page
        from ..page import report_page

        place = output or report_file.with_suffix(".html")
        if (experiments := report.load_experiments(report_file)) is not None:
            if overlay is not None:
                raise UsageError(f"--overlay: lies over the page of a `quantize` run; {report_file} is of `compare` or `study`")
            report.write_text(place, experiments_page(experiments))
            click.echo(f"wrote {place}")
            return
        facts = report.load_report(report_file)
        other = report.load_report(overlay) if overlay is not None else None
        if other is not None and other["model"]["sha256"] != facts["model"]["sha256"]:
            raise UsageError(f"--overlay {overlay}: is of another model ({other['model']['path']}, not {facts['model']['path']})")
        try:
            page = report_page(facts, other)
        except KeyError as missing:
            raise UsageError(f"{report_file}: has no {missing}: it was written by another version of mrecg-onnx") from missing
        report.write_text(place, page)
        click.echo(f"wrote {place}")
