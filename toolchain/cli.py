"""The command line: the group of commands and what its help says first."""

import click

from . import __version__
from .commands.allocate import allocate
from .commands.check import check
from .commands.diagnose import diagnose_command
from .commands.diff import diff
from .commands.equalize import equalize
from .commands.experiments import compare, study
from .commands.export import export
from .commands.inspect import inspect
from .commands.options import EXIT_CODES
from .commands.quantize import quantize
from .commands.report import report_command
from .commands.validate import validate_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="mrecg-onnx")
def main() -> None:
    """Low-bit post-training quantization of ONNX models with MRECG block reconstruction, validated under ONNX Runtime.

    \b
    A first run:
      mrecg-onnx inspect net.onnx                       what is in the model, without data
      mrecg-onnx quantize net.onnx -p w4a8 --preset fast \\
          --calibration-data calib.npz --eval-data eval.npz
    and then open net.w4a8.report/report.html.

    \b
    Results go to standard output, progress and errors to standard error. NO_COLOR is honoured.
    Completion of commands and options, here for bash (zsh_source and fish_source exist too):
      eval "$(_MRECG_ONNX_COMPLETE=bash_source mrecg-onnx)"
    """


_COMMANDS = (quantize, validate_command, report_command, inspect, diagnose_command, allocate, equalize, diff, export, check, compare, study)
for _command in _COMMANDS:
    main.add_command(_command)
