"""Encodings as AIMET writes them and QNN and SNPE read them (version 1.0.0), to and from a quantization table.

An encoding counts codes from 0: x = (q + offset) * scale with q in 0 .. 2^bw - 1, so that a signed grid around zero has the offset
-2^(bw - 1). It carries no codes: the float model beside it holds the values that the codes stand for, which round back to them.
"""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from toolchain.copies import insert_copies
from toolchain.errors import ExportError, UsageError
from toolchain.quant_table import BIAS_BITS, Copy, QuantSpec, QuantTable, TensorQuant, quantize

VERSION = "1.0.0"
_OFF_GRID = 0.01  # steps from the nearest code; a float32 weight on its grid is off by rounding errors alone


def to_aimet(table: QuantTable) -> dict[str, Any]:
    """The encodings of a table, as JSON-ready data.

    Raises:
        ExportError: a block-wise grid, which version 1.0.0 expresses for other arithmetic only, or an fp8 one.
    """
    groups: dict[str, list[dict[str, Any]]] = {"activation_encodings": [], "param_encodings": []}
    for name, grid in table.tensors.items():
        if grid.spec.block is not None:
            raise ExportError(f"{name}: AIMET encodings 1.0.0 have no block-wise grids; quantize without --block-size")
        if grid.spec.float8:
            raise ExportError(f"{name}: AIMET encodings 1.0.0 are of integer grids; quantize with --number-format int")
        bits = grid.spec.bits
        shift = 1 << (bits - 1) if grid.spec.signed else 0
        groups["activation_encodings" if grid.codes is None else "param_encodings"].append(
            {
                "name": name,
                "dtype": "INT",
                "enc_type": "PER_TENSOR" if np.ndim(grid.scale) == 0 else "PER_CHANNEL",
                "bw": bits,
                "is_sym": grid.spec.symmetric,
                "scale": np.asarray(grid.scale).reshape(-1).tolist(),
                "offset": (-(np.asarray(grid.zero_point, np.int64).reshape(-1) + shift)).tolist(),
            }
        )
    return {"version": VERSION, **groups, "excluded_layers": []}


def dumps(table: QuantTable) -> str:
    """The encodings of a table as a file's text."""
    return json.dumps(to_aimet(table), indent=1) + "\n"


def loads(text: str, where: str) -> dict[str, Any]:
    """A file's text as data for `from_aimet`.

    Raises:
        UsageError: it is not JSON; `where` names the file.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: is not JSON: {error}") from error


def with_copies(model: onnx.ModelProto, table: QuantTable) -> QuantTable:
    """The table in which values that Identity nodes of a model make are copies of what these read.

    That is what `with_rounded_weights` writes for layers that requantize their input.
    """
    copies = {
        node.output[0]: Copy(node.input[0], tuple(reader.name for reader in model.graph.node if node.output[0] in reader.input))
        for node in model.graph.node
        if node.op_type == "Identity" and node.output[0] in table
    }
    return table.updated({name: replace(table[name], copy=copy) for name, copy in copies.items() if all(copy.readers)})


def with_rounded_weights(model: onnx.ModelProto, table: QuantTable) -> onnx.ModelProto:
    """The float model with every constant of the table replaced by what its codes stand for, and its copies as Identity nodes."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    insert_copies(rounded.graph, table.copies)
    for tensor in rounded.graph.initializer:
        if tensor.name in table and table[tensor.name].codes is not None:
            tensor.CopyFrom(numpy_helper.from_array(table[tensor.name].dequantized(), tensor.name))
    return rounded


def from_aimet(
    data: Mapping[str, Any],
    constants: Mapping[str, np.ndarray],
    axes: Mapping[str, int | None],
    where: str,
    left_out: AbstractSet[str] = frozenset(),
) -> QuantTable:
    """Read encodings of version 1.0.0 or 0.6.1; weights, and other constants, get the codes of rounding to nearest.

    Args:
        data: the parsed JSON.
        constants: the model's constants by name.
        axes: the channel axis of each weight by name.
        where: names the file in messages.
        left_out: values whose entries are passed over.

    Raises:
        UsageError: a version or an entry that cannot be used.
    """
    table: dict[str, TensorQuant] = {}
    try:
        for kind, entries in _entries(data, where).items():
            for entry in entries:
                if entry["dtype"] == "INT" and entry["bw"] < BIAS_BITS and entry["name"] not in left_out:
                    table[entry["name"]] = _grid(entry, constants.get(entry["name"]), axes, is_weight=kind == "param_encodings")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"{where}: is not a file of AIMET encodings ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return QuantTable(table)


def off_grid(table: QuantTable, constants: Mapping[str, np.ndarray]) -> list[str]:
    """The constants of a table that are not what their codes stand for: those of a model that was not rounded yet."""
    found = []
    for name, grid in table.tensors.items():
        if grid.codes is not None:
            scale, _ = grid.expanded(grid.codes.shape)
            if (np.abs(constants[name] - grid.dequantized()) > _OFF_GRID * scale).any():
                found.append(name)
    return found


def entries_of(data: Mapping[str, Any], where: str) -> frozenset[str]:
    """The values that encodings are of.

    Raises:
        UsageError: as `from_aimet`.
    """
    return frozenset(entry["name"] for entries in _entries(data, where).values() for entry in entries)


def _entries(data: Mapping[str, Any], where: str) -> dict[str, list[dict[str, Any]]]:
    """The entries by kind, in the form of version 1.0.0."""
    version = data.get("version")
    if version not in (VERSION, "0.6.1"):
        raise UsageError(f"{where}: AIMET encodings of version {version} are not read; export them as version 1.0.0")
    kinds = ("activation_encodings", "param_encodings")
    try:
        if version == VERSION:
            return {kind: list(data[kind]) for kind in kinds}
        return {kind: [_modern(name, rows) for name, rows in data[kind].items()] for kind in kinds}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"{where}: is not a file of AIMET encodings ({type(error).__name__}: {error})") from error


def _modern(name: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """An entry of version 0.6.1 (a list with a dictionary for each channel) in the form of 1.0.0."""
    first = rows[0]
    entry: dict[str, Any] = {"name": name, "dtype": first["dtype"].upper(), "bw": first["bitwidth"]}
    if entry["dtype"] == "INT":
        entry |= {"is_sym": str(first["is_symmetric"]) == "True"}
        entry |= {"scale": [row["scale"] for row in rows], "offset": [row["offset"] for row in rows]}
    return entry


def _grid(entry: Mapping[str, Any], constant: np.ndarray | None, axes: Mapping[str, int | None], is_weight: bool) -> TensorQuant:
    name, bits, symmetric = entry["name"], int(entry["bw"]), entry["is_sym"] in (True, "True")
    if is_weight and constant is None:
        raise ValueError(f"the model has no constant {name!r} for that encoding: was it made for another model?")
    scale, offset = np.asarray(entry["scale"], np.float32), np.asarray(entry["offset"], np.int64)
    signed = is_weight or (symmetric and bool((offset == -(1 << (bits - 1))).all()))
    zero_point = (-offset - ((1 << (bits - 1)) if signed else 0)).astype(np.int32)
    axis = axes.get(name) if len(scale) > 1 else None
    if len(scale) > 1 and (axis is None or constant is None or constant.shape[axis] != len(scale)):
        raise ValueError(f"the {len(scale)} scales of {name!r} do not fit its channels")
    spec = QuantSpec(bits, signed, symmetric, axis)
    grid = TensorQuant(spec, scale if axis is not None else scale[0], zero_point if axis is not None else zero_point[0])
    if constant is None:
        return grid
    return TensorQuant(spec, grid.scale, grid.zero_point, quantize(constant, grid))
