"""How a command ends: an error as one line and its exit code, an interruption with what is left, a gate that was not passed."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..errors import AccuracyGateError, ExportError, MrecgError

if TYPE_CHECKING:
    from ..validation import ValidationReport


def check_parity(checked: "ValidationReport") -> None:
    """Refuse a file that ONNX Runtime computes differently from what was learned."""
    from ..verdict import parity_problem

    problem = parity_problem(checked)
    if problem is not None:
        raise ExportError(problem)


def check_drop(checked: "ValidationReport", limit: float | None) -> None:
    """Refuse an accuracy, or a metric, that dropped by more than `limit`; None takes any."""
    from ..wording import figure

    if limit is None:
        return
    if checked.drop is None:
        raise AccuracyGateError(
            "--max-drop: the model has no class output [N, C], so that there is no accuracy to compare; --metric measures what you do"
        )
    if checked.metric is not None and checked.drop > limit:
        raise AccuracyGateError(f"{checked.metric.name} dropped by {figure(checked.drop)}, more than --max-drop {limit:g}")
    if checked.drop > limit:
        what = "top-1 accuracy" if checked.top1_float is not None else "agreement with the float model"
        raise AccuracyGateError(f"{what} dropped by {checked.drop:.2f} points, more than --max-drop {limit:g}")


@contextmanager
def reported(verbose: bool, who: str = "") -> Iterator[None]:
    """Turn the project's errors into one line, after `who` says it, and their exit code."""
    try:
        yield
    except MrecgError as error:
        if verbose and error.__cause__ is not None:
            import traceback

            traceback.print_exception(error)
        click.echo(f"{who}error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, _Terminated)
        click.echo(f"{who}{'terminated' if terminated else 'interrupted'}{interruption or '; nothing was written'}", err=True)
        sys.exit(143 if terminated else 130)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it takes the machine away."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Make SIGTERM an interruption like Ctrl-C.

    `left` is called when the work breaks off, by an error too; for interruptions it says what there is to go on from ("": nothing).
    """
    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if handles else None
    try:
        yield
    except BaseException as error:
        text = left()
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(text) from None
        raise
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before)
