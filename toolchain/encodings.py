"""The quantization table as a file: JSON that round-trips exactly.

One file: codes are base64 of little-endian integers inside the JSON, since a second file beside it would get lost, and a list of decimal
numbers is five times as long. Scales are decimals that read back to the same float32, so that any diff tool compares two tables.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import UsageError
from .quant_table import Copy, QuantSpec, QuantTable, TensorQuant

FORMAT, VERSION = "mrecg-onnx encodings", 1


@dataclass(frozen=True)
class Encodings:
    """A table, and what it was made for: the float model's SHA-256, the target's name, and the precision in words.

    `config` has the settings that it was made with, as TOML; nothing in files of versions before these were kept.
    """

    table: QuantTable
    source_sha256: str
    target: str
    precision: str
    config: str = ""


def dumps(encodings: Encodings) -> str:
    """The file's text: a line for each value, in the table's order."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "source_sha256": encodings.source_sha256,
        "target": encodings.target,
        "precision": encodings.precision,
        "config": encodings.config,
    }
    lines = [json.dumps({"name": name, **_row(grid)}) for name, grid in encodings.table.tensors.items()]
    return json.dumps(head, indent=1)[:-2] + ',\n "tensors": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def loads(text: str, where: str) -> Encodings:
    """Read a file's text.

    Raises:
        UsageError: it is no such file, damaged, or of a later version; `where` names it.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"format {data['format']!r}, version {data['version']!r}; this program reads {FORMAT!r}, version {VERSION}")
        table = QuantTable({row["name"]: _grid(row) for row in data["tensors"]})
        return Encodings(table, str(data["source_sha256"]), str(data["target"]), str(data["precision"]), str(data.get("config", "")))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{where}: is not a table of encodings ({reason}); `quantize --encodings` writes one") from error


def spec_of(values: Mapping[str, Any]) -> QuantSpec:
    """A spec from JSON, which knows no tuples."""
    pairs = {name: tuple(values[name]) for name in ("span", "summed") if values.get(name) is not None}
    return QuantSpec(**{**values, **pairs})


def copy_of(row: Mapping[str, Any]) -> Copy | None:
    """What a row says of the value that its own is a copy of."""
    return Copy(str(row["copy_of"]), tuple(map(str, row["readers"]))) if row.get("copy_of") is not None else None


def _dtype(spec: QuantSpec) -> np.dtype:
    return np.dtype("<i1" if spec.bits <= 8 and not spec.float8 else "<i4")


def _row(grid: TensorQuant) -> dict[str, Any]:
    defaults = asdict(QuantSpec(0, signed=False, symmetric=False))
    spec = {key: value for key, value in asdict(grid.spec).items() if key in ("bits", "signed", "symmetric") or value != defaults[key]}
    row: dict[str, Any] = {"spec": spec, "scale": np.asarray(grid.scale).tolist(), "zero_point": np.asarray(grid.zero_point).tolist()}
    if grid.tied_to is not None:
        row["tied_to"] = grid.tied_to
    if grid.fixed:
        row["fixed"] = True
    if grid.copy is not None:
        row["copy_of"], row["readers"] = grid.copy.origin, list(grid.copy.readers)
    if grid.codes is not None:
        dtype = _dtype(grid.spec)
        row["shape"] = list(grid.codes.shape)
        row["codes"] = base64.b64encode(grid.codes.astype(dtype).tobytes()).decode()
    return row


def _grid(row: Mapping[str, Any]) -> TensorQuant:
    spec = spec_of(row["spec"])
    scale, zero_point = np.asarray(row["scale"], np.float32)[()], np.asarray(row["zero_point"], np.int32)[()]
    if np.shape(scale) != np.shape(zero_point) or not (np.asarray(scale) > 0).all():
        raise ValueError(f"the scales of {row['name']!r} are not positive numbers, each with a zero point")
    codes = None
    if "codes" in row:
        flat = np.frombuffer(base64.b64decode(row["codes"], validate=True), _dtype(spec))
        codes = flat.astype(np.int32).reshape(row["shape"])
        if codes.size and (codes.min() < spec.qmin or codes.max() > spec.qmax):
            raise ValueError(f"codes of {row['name']!r} are off their grid")
    return TensorQuant(spec, scale, zero_point, codes, row.get("tied_to"), row.get("fixed", False), copy_of(row))
