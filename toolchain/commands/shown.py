"""What a command prints, and where."""

import dataclasses

from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a command prints: results to standard output, progress to standard error, so that a pipe carries the results only."""

    as_json: bool = False
    verbose: bool = False
    quiet: bool = False

    @property
    def out(self) -> Console:
        return Console(quiet=self.quiet or self.as_json, highlight=False)

    @property
    def log(self) -> Console:
        console = Console(stderr=True, quiet=self.quiet, highlight=False)
        console.soft_wrap = not console.is_terminal  # a line of a log stays one line
        return console
