"""One setting of a run: its default, its help text, and the values it may have."""

import dataclasses
from typing import Any

from .errors import UsageError, near_misses


def option(default: Any, help_text: str, section: str, **bounds: Any) -> Any:
    """A field with its help text, the section of `--help` it belongs to, and what it may be (choices, low, high, is_file)."""
    return dataclasses.field(default=default, metadata={"help": help_text, "section": section, **bounds})


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def check(spec: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that a field made by `option` may not have."""
    if value is None:
        return
    choices, low, high = (spec.metadata.get(key) for key in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        known = [str(choice) for choice in choices]
        raise UsageError(f"{flag(spec.name)} {value}: must be one of {', '.join(known)}{near_misses(str(value), known)}")
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        limits = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise UsageError(f"{flag(spec.name)} {value}: must be {limits}")
