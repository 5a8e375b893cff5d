"""Settings as a TOML file, whose keys are the flags' names, and the shorthand of a precision."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tomli_w

from .config import Config
from .data_config import DataConfig
from .errors import UsageError, near_misses


def load_config(path: Path) -> dict[str, Any]:
    """Read the keys of a TOML file, as keyword arguments of `Config` and `DataConfig`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from error
    return settings_in(text, f"--config {path}")


def settings_in(text: str, where: str) -> dict[str, Any]:
    """What TOML text has, as keyword arguments of `Config` and `DataConfig`; `where` names it in messages."""
    try:
        return settings_of(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: is not TOML: {error}") from error


def settings_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys and values of a configuration file as keyword arguments; `where` names it in messages."""
    hints = get_type_hints(Config) | get_type_hints(DataConfig)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name == "precision" and isinstance(value, str):
            values |= parse_precision(value)
            continue
        if name not in hints:
            raise UsageError(f"{where}: unknown key {key!r}{near_misses(key.replace('_', '-'), [n.replace('_', '-') for n in hints])}")
        values[name] = _typed(key, value, hints[name])
    return values


def split(values: Mapping[str, Any]) -> tuple[Config, DataConfig]:
    """Build both halves of a configuration from keyword arguments."""
    data = {f.name for f in dataclasses.fields(DataConfig)}
    return (
        Config(**{name: value for name, value in values.items() if name not in data}),
        DataConfig(**{name: value for name, value in values.items() if name in data}),
    )


def resolved(config: Config, data: DataConfig) -> dict[str, Any]:
    """All settings by their flag names, open ones left out."""
    pairs = {f.name.replace("_", "-"): getattr(half, f.name) for half in (config, data) for f in dataclasses.fields(half)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs.items() if value is not None}


def dump_config(config: Config, data: DataConfig) -> str:
    """The configuration as TOML text that `load_config` reads back."""
    return tomli_w.dumps(resolved(config, data))


def parse_precision(text: str) -> dict[str, Any]:
    """`w4a8` -> weight and activation bits; `fp8` -> E4M3 for both."""
    if text.strip().lower() == "fp8":
        return {"weight_bits": 8, "activation_bits": 8, "number_format": "fp8"}
    match = re.fullmatch(r"[wW](\d+)[aA](\d+)", text.strip())
    if match is None:
        raise UsageError(f"--precision {text!r}: expected w<bits>a<bits>, such as w4a4, w4a8, w2a4, w8a8 or w4a16, or fp8")
    return {"weight_bits": int(match[1]), "activation_bits": int(match[2])}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """A TOML value as the field's type; integers may stand for floats and for the string choices `8`."""
    if hint == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"configuration key {key!r}: expected a list of strings, got {value!r}")
    allowed = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) is int and str in allowed:
        return str(value)
    raise UsageError(f"configuration key {key!r}: expected {' or '.join(kind.__name__ for kind in allowed)}, got {value!r}")
