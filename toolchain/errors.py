"""One tree of errors, one exit code for each kind; a message says what is wrong, where, and what to do next."""

import difflib
from collections.abc import Iterable


class MrecgError(Exception):
    """Base of every error that a user can cause or mend; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MrecgError):
    """An option, a configuration key or an output place that cannot be used."""

    exit_code = 2


class UnsupportedModelError(MrecgError):
    """The model file cannot be read, checked, or quantized."""

    exit_code = 3


class DataError(MrecgError):
    """Calibration or evaluation samples that do not fit the model."""

    exit_code = 4


class ExportError(MrecgError):
    """The quantized file could not be written, or ONNX Runtime does not execute what was simulated."""

    exit_code = 5


class AccuracyGateError(MrecgError):
    """The accuracy dropped by more than `--max-drop`; the model was still written."""

    exit_code = 6


class TargetRuleError(MrecgError):
    """A file breaks rules that the parser of its target documents."""

    exit_code = 9


class InstallationError(MrecgError):
    """Installed packages that do not fit together."""

    exit_code = 7


class StorageError(MrecgError):
    """The run folder cannot be written: a full disk, a folder that is gone."""

    exit_code = 8


class ProcessError(MrecgError):
    """Another process of a run under torchrun is gone."""

    exit_code = 10


class DeviceMemoryError(MrecgError):
    """A device has not the memory for a single sample."""

    exit_code = 11


def near_misses(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ` (did you mean 'a', 'b'?)` for the known words closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f" (did you mean {', '.join(repr(c) for c in close)}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, which may go on for a page; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
