"""Progress where no terminal is: one line for each piece of work, and a rate and a time left that are those of this process."""

import io

import pytest
from rich.console import Console

from toolchain import terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("toolchain.terminal.time.monotonic", lambda: now[0])
    return now


def lines(clock: list[float], *shown: tuple[float, str, int, int, float]) -> list[str]:
    """What is printed when progress is shown at these seconds."""
    file = io.StringIO()
    with terminal.progress_on(Console(file=file, width=60)) as progress:
        for seconds, what, done, total, loss in shown:
            clock[0] = 100.0 + seconds
            progress(what, done, total, loss)
    return file.getvalue().splitlines()


def test_a_line_for_each_piece_of_work(clock: list[float]) -> None:
    found = lines(
        clock,
        (0, "reconstructing b00", 0, 1000, 2.0),
        (1, "reconstructing b00", 100, 1000, 1.5),  # the same piece, shortly after
        (10, "reconstructing b01", 500, 1000, 1.0),
        (45, "reconstructing b01", 600, 1000, 0.5),  # the same piece, but half a minute later
    )
    assert found == [
        "reconstructing b00 (0 %, loss 2)",
        "reconstructing b01 (50 %, loss 1, 50 steps/s, 10 s left)",
        "reconstructing b01 (60 %, loss 0.5, 13.3 steps/s, 30 s left)",
    ]


def test_what_was_done_before_a_resumption_counts_for_nothing(clock: list[float]) -> None:
    found = lines(clock, (0, "reconstructing b08", 8000, 10000, 1.0), (10, "reconstructing b09", 9000, 10000, 1.0))
    assert found[1] == "reconstructing b09 (90 %, loss 1, 100 steps/s, 10 s left)"


def test_runs_of_an_experiment_have_no_rate(clock: list[float]) -> None:
    found = lines(clock, (0, "run 1/4: mse w4a4 seed 0", 0, 4000, float("nan")), (60, "run 2/4: brecq w4a4 seed 0", 1000, 4000, 3.0))
    assert found[1] == "run 2/4: brecq w4a4 seed 0 (25 %, loss 3, 3 min left)"
