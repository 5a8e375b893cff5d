"""QDQ export: the source graph with QuantizeLinear / DequantizeLinear pairs and integer weights, and nothing else changed.

For a value v the names are `v_scale`, `v_zero_point`, `v_quantized` and `v_dequantized`, for the nodes `v_QuantizeLinear`, `v_Clip` and
`v_DequantizeLinear`. A weight w becomes `w_quantized`, and its DequantizeLinear makes the value `w`, so that the node that reads it is
untouched. A value that repeats the grid of another, being a rearrangement of it, shares its scale and zero point. Values around one with a
long name are named after its ends: a dozen copies of the names that some converters make would weigh more than a small layer.

A table that is only looked up is dequantized behind the lookup (`v_codes` is what Gather makes of the codes, v what it made of the table),
and a weight that only one branch of an If reads is dequantized in that branch.

Fewer than 8 bits travel in 8-bit integers. What keeps them on their grid is a Clip on the integers between QuantizeLinear and
DequantizeLinear: ONNX Runtime keeps its integer kernels around it, which it does not for a Clip on floats. A Relu or Clip in front of a
quantizer is folded into those bounds, which is exact: rounding is monotone, so round(clip(x, a, b)) = clip(round(x), round(a), round(b)).
Runtimes that take nothing between the two (TensorRT, OpenVINO, QNN) get that Clip on the floats in front of QuantizeLinear, between the
ends of the grid, which is exact for the same reason; there Relu and Clip stay.

A HardSigmoid of a quantized value is an Add with its ends cut off by the quantizer behind it, whose grid is from 0 to 1: `v_scaled` is that
value dequantized with a scale that has the factor in it, `v_shift` what is added. ONNX Runtime has no integer kernel for HardSigmoid, which
takes it four passes over floats, and one for Add.

A layer may read a value on a grid of its own (`toolchain.copies`). DequantizeLinear and QuantizeLinear take ONNX Runtime's CPU provider two
passes over the value, in floats; with an Add of zero between them they are one QLinearAdd. `v_zero_code` is that zero: a constant of its
own, for ONNX Runtime gives an operand another shape than a zero point may have. QLinearAdd makes fewer roundings: where a code of the value
lies on a tie of the copy's grid there is no Add, so that the file says what runs.

A depthwise convolution that makes several channels of each reads repeated codes (`toolchain.repeats`), a Relu that no quantizer takes over
from a matrix product is a Max (`fusions`), and a layer that is kept in float is kept from ONNX Runtime (`kept_float`).
"""

import itertools
import os
import tempfile
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

import toolchain.large as large
from toolchain.copies import insert_copies
from toolchain.errors import ExportError
from toolchain.quant_table import BIAS_BITS, QuantTable, TensorQuant, dequantize, quantize
from toolchain.repeats import repeat_channels
from toolchain.scheme import ORT_CPU, Scheme

from .fusions import join_gelus, let_products_fuse
from .kept_float import guard
from .storage import Storage, packed_storage_of, storage_of
from .swishes import spell_out
from .walks import all_nodes, reads, replace_nodes, subgraphs, value_names

METADATA_PREFIX = "mrecg_onnx."
_LONG = 32  # characters
_STEEPEST = 1e6  # slope of a HardSigmoid on integers, beyond which float32 may overflow
_SUFFIXES = (  # of the values around a value
    *("_scale", "_zero_point", "_quantized", "_dequantized", "_clipped", "_qmin", "_qmax", "_float", "_codes"),
    *("_zero", "_zero_code", "_rescaled", "_scaled", "_shift", "_shifted"),
    *("_scaled_scale", "_shift_code", "_shift_scale", "_shift_zero_point"),
)
_ONNX_RUNTIME = ("ort-cpu", "ort-cuda", "academic")  # who alone has 2-bit integers, and defects to be guarded against


def export_qdq(
    model: onnx.ModelProto, table: QuantTable, metadata: Mapping[str, str] | None = None, scheme: Scheme = ORT_CPU
) -> onnx.ModelProto:
    """Return a copy of a float model that computes on the grids of a table.

    Args:
        model: the normalised float model that the table was made for.
        table: grids by value name; those with codes are constants of the model.
        metadata: added to the model's metadata under the prefix `mrecg_onnx.`.
        scheme: the rules of the target; the table should come from the same.

    Raises:
        ExportError: a grid has no ONNX type, or the opset cannot be raised to the one it needs.
    """
    tables = _tables(model.graph, table)
    storages = _storages(model.graph, table, scheme, tables)
    quantized = _at_opset(model, max(storages.values(), key=lambda storage: storage.opset, default=None))
    insert_copies(quantized.graph, table.copies)
    if scheme.fused_gates:
        spell_out(quantized.graph, table.tensors)
    _Editor(quantized.graph, table, scheme, storages, tables).edit()
    if scheme.kernels:
        repeat_channels(quantized.graph)
        let_products_fuse(quantized.graph)
        join_gelus(quantized)
    if scheme.name in _ONNX_RUNTIME:
        guard(quantized)
    onnx.helper.set_model_props(
        quantized,
        {entry.key: entry.value for entry in model.metadata_props}
        | {METADATA_PREFIX + key: value for key, value in (metadata or {}).items()},
    )
    complaint = _complaint(quantized)
    if complaint is not None and _complaint(model) is None:  # ONNX Runtime runs some files that the checker refuses
        raise ExportError(f"the exported graph is not valid ONNX: {complaint}")
    return quantized


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model beside its place and move it there, so that no half-written file is ever seen.

    What does not fit into one protobuf goes into `path` + `.data`.

    Raises:
        ExportError: the folder cannot be written.
    """
    if large.weight_bytes(model) > large.LIMIT:
        try:
            large.stored(model, path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
        return
    if large.folder_of(model) is not None:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        large.brought_in(whole)
        model = whole
    _write(model.SerializeToString(deterministic=True), path)


def write_text(text: str, path: Path) -> None:
    """Write a text file in the same way.

    Raises:
        ExportError: the folder cannot be written.
    """
    _write(text.encode(), path)


def _write(content: bytes, path: Path) -> None:
    handle = None
    try:
        descriptor, handle = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(handle, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(handle, path)
    except OSError as error:
        if handle is not None:
            Path(handle).unlink(missing_ok=True)
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error


def _complaint(model: onnx.ModelProto) -> str | None:
    whole = large.weight_bytes(model) <= large.OUTSIDE and large.folder_of(model) is None
    try:
        onnx.checker.check_model(model if whole else large.skeleton(model))
    except onnx.checker.ValidationError as error:
        return str(error)
    return None


def _tables(graph: onnx.GraphProto, table: QuantTable) -> frozenset[str]:
    """The constants of a quantization table that are only looked up."""
    found = {name for name, grid in table.tensors.items() if grid.codes is not None}
    for node in all_nodes(graph.node):
        found.difference_update(node.input[1:] if _is_lookup(node) else node.input)
    return frozenset(found.intersection(reads(graph.node)))


def _is_lookup(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and node.domain in ("", "ai.onnx")


def _storages(graph: onnx.GraphProto, table: QuantTable, scheme: Scheme, tables: AbstractSet[str]) -> dict[str, Storage]:
    """The type of each grid's codes. Gather takes no packed ones."""
    for name, grid in table.tensors.items():
        if grid.spec.float8 and (scheme.float8 == "none" or (scheme.float8 == "weights" and grid.codes is None)):
            what = "fp8 activations" if scheme.float8 == "weights" else "fp8"
            raise ExportError(f"{name}: {scheme.name} has no {what}; use --target tensorrt, or quantize again with another --precision")
    if scheme.storage == "fast":
        return {name: storage_of(grid.spec) for name, grid in table.tensors.items()}
    bytes_ = {name for name, grid in table.tensors.items() if grid.codes is None and grid.spec.bits <= 8}
    beside = {value for node in graph.node if not bytes_.isdisjoint(node.input) for value in node.input}
    has_int2 = scheme.name in _ONNX_RUNTIME
    return {
        name: storage_of(grid.spec)
        if grid.codes is None or name in tables or (scheme.packed_blocks and grid.spec.block is None)
        else packed_storage_of(grid.spec, name in beside or not has_int2)
        for name, grid in table.tensors.items()
    }


def _at_opset(model: onnx.ModelProto, storage: Storage | None) -> onnx.ModelProto:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    needed = storage.opset if storage is not None else 0
    if storage is None or opset >= needed:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        raised = large.with_weights_of(model, lambda graph: version_converter.convert_version(graph, needed))
    except Exception as error:  # the C++ converter raises bare RuntimeError subclasses
        raise ExportError(
            f"{storage.dtype} codes need opset {needed}, and opset {opset} cannot be raised: {error}; --storage fast and 8-bit activations "
            "need opset 13 only"
        ) from error
    raised.ir_version = max(raised.ir_version, storage.ir)
    return raised


class _Editor:
    """Rewrites one graph in place."""

    def __init__(
        self, graph: onnx.GraphProto, table: QuantTable, scheme: Scheme, storages: Mapping[str, Storage], tables: AbstractSet[str]
    ) -> None:
        self._graph = graph
        self._table = table
        self._scheme = scheme
        self._storages = storages
        self._tables = tables
        self._outputs = {output.name for output in graph.output}
        self._quantized_outputs = self._outputs - {value.name for value in graph.input} if scheme.results == "all" else set()
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._new_constants: list[onnx.TensorProto] = []
        self._kept_as_codes: set[str] = set()
        self._with_parameters: set[str] = set()
        self._bases: dict[str, str] = {}
        self._held_as: dict[str, str] = {}  # value -> the integers that its DequantizeLinear reads
        self._taken = value_names(graph)

    def edit(self) -> None:
        table = self._table.tensors
        nodes: list[onnx.NodeProto] = []
        if self._scheme.bias != "int32":
            biases = {name: grid for name, grid in table.items() if grid.spec.bits == BIAS_BITS}
            table = {name: grid for name, grid in table.items() if name not in biases}
            self._new_constants += [numpy_helper.from_array(grid.dequantized(), name) for name, grid in biases.items()]
        read = set(reads(self._graph.node))
        float_ends = self._outputs - self._quantized_outputs - read  # of a table for a target that quantizes graph outputs
        table = {name: grid for name, grid in table.items() if name not in float_ends}
        # A quantized graph output keeps its name behind the pair; the value in front of it gets another.
        renamed = {name: self._dequantized(name) for name, grid in table.items() if grid.codes is None}
        for name in sorted(self._tables):
            self._look_up(self._graph, name, self._codes(name, table[name]))
        branches = any(subgraphs(node) for node in self._graph.node)
        for name, grid in table.items():
            if grid.codes is not None and name not in self._tables:
                home, before = _home(self._graph, name) if branches else self._graph, len(self._new_constants)
                pair = self._constant_pair(name, grid)
                if home is self._graph:
                    nodes.append(pair)
                    continue
                home.node.insert(0, pair)  # with its constants: ONNX Runtime looks for them in the same graph
                home.initializer.extend(self._new_constants[before:])
                del self._new_constants[before:]
        for value in self._graph.input:
            if value.name in renamed:
                nodes += self._pair(value.name, value.name, table[value.name], (None, None))
        for node in self._graph.node:
            gate = self._hard_sigmoid(node)
            if gate is not None:
                nodes += gate
                continue
            kept = _copied(node)
            _rename(kept, renamed)
            quantized = [output for output in node.output if output in renamed]
            bounds = self._absorbed(node) if quantized == list(node.output) else None
            if bounds is None:
                kept.output[:] = [f"{self._short(output)}_float" if renamed.get(output) == output else output for output in node.output]
                nodes.append(kept)
            for output, made in zip(node.output, kept.output, strict=True):
                if output not in renamed:
                    continue
                origin = made if bounds is None else kept.input[0]
                nodes += self._pair(output, origin, table[output], bounds or (None, None))
        read = self._outputs.union(reads(nodes))  # not what a HardSigmoid alone read
        replace_nodes(self._graph, (node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read))
        self._replace_initializers()

    def _hard_sigmoid(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """A HardSigmoid as an Add that saturates, between codes of one 8-bit type; None where it must stay."""
        if node.op_type != "HardSigmoid" or node.domain not in ("", "ai.onnx") or "HardSigmoid" not in self._scheme.elementwise:
            return None
        x, name = node.input[0], node.output[0]
        attributes = {attribute.name: attribute.f for attribute in node.attribute}
        alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
        if not self._shares_bytes(x, name) or not 0 < alpha < _STEEPEST or name in self._outputs - self._quantized_outputs:
            return None
        grid, operand, storage = self._table[name], self._table[x], self._storages[name]
        ends = dequantize(np.array([storage.low, storage.high]), grid)
        if (grid.spec.qmin, grid.spec.qmax) != (storage.low, storage.high) or np.abs(ends - (0, 1)).max() > 1e-6:
            return None
        scaled, shifted = (f"{self._short(name)}_{key}" for key in ("scaled", "shifted"))
        step = np.float32(alpha) * np.asarray(operand.scale, np.float32)
        if step < np.finfo(np.float32).tiny:
            return None
        operands = [self._held_as[x], self._constant(f"{scaled}_scale", step), self._parameters(x, operand, storage)[1]]
        number = self._number(name, _off_tie(beta, grid), storage)
        return [
            helper.make_node("DequantizeLinear", operands, [scaled], f"{name}_Scaled"),
            number,
            helper.make_node("Add", [scaled, number.output[0]], [shifted], node.name),
            *self._pair(name, shifted, grid, (None, None)),
        ]

    def _shares_bytes(self, x: str, y: str) -> bool:
        """Whether an operand and a result are on grids of one 8-bit integer type."""
        if x not in self._held_as or y not in self._table or self._storages[x] != self._storages[y]:
            return False
        return not self._storages[y].is_float and self._storages[y].dtype.itemsize == 1

    def _number(self, name: str, number: float, storage: Storage) -> onnx.NodeProto:
        """What makes the number that is added for a value, of the code at one end of a grid whose zero is at the other."""
        shift = f"{self._short(name)}_shift"
        step = np.float32(abs(number) / (storage.high - storage.low))
        number, step = (number, step) if step >= np.finfo(np.float32).tiny else (0.0, np.float32(1))
        zero, code = (storage.low, storage.high) if number >= 0 else (storage.high, storage.low)
        parts = {"code": np.asarray(code if number else zero), "scale": step, "zero_point": np.asarray(zero)}
        arrays = {key: array if key == "scale" else array.astype(storage.dtype) for key, array in parts.items()}
        operands = [self._constant(f"{shift}_{key}", array) for key, array in arrays.items()]
        return helper.make_node("DequantizeLinear", operands, [shift], f"{name}_Shift")

    def _absorbed(self, node: onnx.NodeProto) -> tuple[float | None, float | None] | None:
        """The float bounds of a Relu or Clip that the quantizer behind it takes over (of a copy: none); None where the node must stay."""
        if self._table[node.output[0]].copy is not None:
            return (None, None)
        if self._scheme.saturation != "integer":
            return None
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Relu", "Clip") or node.output[0] in self._outputs:
            return None
        if any(name and name not in self._constants for name in node.input[1:]):
            return None
        bounds = [numpy_helper.to_array(self._constants[name]).item() if name else None for name in node.input[1:]]
        low, high = (0.0, None) if node.op_type == "Relu" else [*bounds, None, None][:2]
        grid, storage = self._table[node.output[0]], self._storages[node.output[0]]
        if storage.dtype.itemsize > 1 and _code_range(grid, (low, high)) != (storage.low, storage.high):
            return None  # ONNX Runtime has no Clip kernel for 16-bit integers
        return (low, high)

    def _pair(self, name: str, origin: str, grid: TensorQuant, bounds: tuple[float | None, float | None]) -> list[onnx.NodeProto]:
        """QuantizeLinear and DequantizeLinear; where the type is wider than the grid, a Clip on the integers between them, or in front."""
        storage = self._storages[name]
        parameters = self._parameters(name, grid, storage)
        short = self._short(name)
        low, high = _code_range(grid, bounds)
        # A tied value holds codes of the grid already.
        clips = (low, high) != (storage.low, storage.high) and grid.tied_to is None
        on_integers = self._scheme.saturation == "integer"
        limits: list[str] = []
        if clips:
            ends = np.array([low, high], storage.dtype) if on_integers else dequantize(np.array([low, high]), grid)
            limits = [self._constant(f"{short}_{key}", end) for key, end in zip(("qmin", "qmax"), ends, strict=True)]
        quantized, clipped = f"{short}_quantized", f"{short}_clipped"
        nodes = []
        if self._is_rescaled(grid, storage):
            zero, rescaled = f"{short}_zero", f"{short}_rescaled"
            code = self._constant(f"{short}_zero_code", np.asarray(grid.zero_point).astype(storage.dtype))
            nodes.append(helper.make_node("DequantizeLinear", [code, *parameters], [zero], f"{name}_Zero"))
            nodes.append(helper.make_node("Add", [origin, zero], [rescaled], f"{name}_Add"))
            origin = rescaled
        if clips and not on_integers:
            nodes.append(helper.make_node("Clip", [origin, *limits], [clipped], f"{name}_Clip"))
            origin = clipped
        nodes.append(helper.make_node("QuantizeLinear", [origin, *parameters], [quantized], f"{name}_QuantizeLinear"))
        if clips and on_integers:
            nodes.append(helper.make_node("Clip", [quantized, *limits], [clipped], f"{name}_Clip"))
            quantized = clipped
        nodes.append(helper.make_node("DequantizeLinear", [quantized, *parameters], [self._dequantized(name)], f"{name}_DequantizeLinear"))
        self._held_as[name] = quantized
        return nodes

    def _is_rescaled(self, grid: TensorQuant, storage: Storage) -> bool:
        """Whether a value is a copy that QLinearAdd, whose operands have one 8-bit type, makes to the code."""
        if not self._scheme.rescales or grid.copy is None or self._storages.get(grid.copy.origin) != storage:
            return False
        return not storage.is_float and storage.dtype.itemsize == 1 and not _has_ties(self._table[grid.copy.origin], grid)

    def _dequantized(self, name: str) -> str:
        return name if name in self._quantized_outputs else f"{self._short(name)}_dequantized"

    def _short(self, name: str) -> str:
        """What the values around a value are named after: its own name, or the ends of a long one; with a number where that is taken."""
        if name not in self._bases:
            short = name if len(name) <= _LONG else f"{name[: _LONG // 2 - 2]}..{name[-_LONG // 2 :]}"
            candidates = itertools.chain([short], (f"{short}.{number}" for number in itertools.count(2)))
            free = next(base for base in candidates if self._is_free(base, name))
            self._taken.add(free)
            self._bases[name] = free
        return self._bases[name]

    def _is_free(self, base: str, name: str) -> bool:
        return (base == name or base not in self._taken) and self._taken.isdisjoint(f"{base}{suffix}" for suffix in _SUFFIXES)

    def _codes(self, name: str, grid: TensorQuant) -> list[str]:
        """The codes of a constant with their scale and zero point, as constants."""
        assert grid.codes is not None
        storage = self._storages[name]
        self._kept_as_codes.add(name)
        codes = self._constant(f"{self._short(name)}_quantized", storage.numbers(grid.codes))
        return [codes, *self._parameters(name, grid, storage)]

    def _look_up(self, graph: onnx.GraphProto, name: str, codes: list[str]) -> None:
        """Let the Gather nodes of a graph, and of those inside it, look up codes, and dequantize what they find."""
        channels = self._table[name].spec.axis is not None
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for subgraph in subgraphs(node):
                self._look_up(subgraph, name, codes)
            nodes.append(node)
            if _is_lookup(node) and node.input[0] == name:
                found = node.output[0]
                node.input[0], node.output[0] = codes[0], f"{self._short(found)}_codes"
                behind = [node.output[0], *codes[1:]]
                nodes.append(helper.make_node("DequantizeLinear", behind, [found], f"{found}_LookupDequantizeLinear"))
                if channels:
                    nodes[-1].attribute.append(helper.make_attribute("axis", -1))
        if len(nodes) > len(graph.node):
            replace_nodes(graph, nodes)

    def _constant_pair(self, name: str, grid: TensorQuant) -> onnx.NodeProto:
        node = helper.make_node("DequantizeLinear", self._codes(name, grid), [name], f"{name}_DequantizeLinear")
        if grid.spec.axis is not None:
            node.attribute.append(helper.make_attribute("axis", grid.spec.axis))
        if grid.spec.block is not None:
            node.attribute.append(helper.make_attribute("block_size", grid.spec.block))
        return node

    def _parameters(self, name: str, grid: TensorQuant, storage: Storage) -> list[str]:
        """The scale and the zero point of a value, as constants; those of the value whose grid it repeats."""
        origin = grid.tied_to
        if origin is not None and origin in self._table and self._storages[origin] == storage:
            name, grid = origin, self._table[origin]
        names = [f"{self._short(name)}_{key}" for key in ("scale", "zero_point")]
        if name not in self._with_parameters:
            self._with_parameters.add(name)
            self._constant(names[0], np.asarray(grid.scale, np.float32) * np.float32(storage.unit))
            self._constant(names[1], np.asarray(grid.zero_point).astype(storage.dtype))
        return names

    def _constant(self, name: str, array: np.ndarray | np.generic) -> str:
        self._new_constants.append(numpy_helper.from_array(np.ascontiguousarray(array) if array.ndim else np.asarray(array), name))
        return name

    def _replace_initializers(self) -> None:
        """Drop constants that nothing reads any more (float weights, absorbed bounds) and what was declared of vanished values."""
        read = set(reads(self._graph.node)) | self._outputs
        made = {value for node in self._graph.node for value in node.output}
        gone = made | self._kept_as_codes | {tensor.name for tensor in self._new_constants}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read and tensor.name not in gone]
        del self._graph.initializer[:]
        self._graph.initializer.extend([*kept, *self._new_constants])
        known = made | {tensor.name for tensor in self._graph.initializer}
        infos = [info for info in self._graph.value_info if info.name in known]
        del self._graph.value_info[:]
        self._graph.value_info.extend(infos)


def _home(graph: onnx.GraphProto, name: str) -> onnx.GraphProto:
    """Where a constant is dequantized: in the branch of an If that alone reads it, so that the other branch does not wait for it.

    The body of a Loop would do it again in every round.
    """
    readers = [node for node in graph.node if name in reads([node])]
    if len(readers) != 1 or readers[0].op_type != "If" or name in (output.name for output in graph.output):
        return graph
    branches = [g for g in subgraphs(readers[0]) if name in reads(g.node) or name in (output.name for output in g.output)]
    return _home(branches[0], name) if len(branches) == 1 else graph


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _rename(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Let a node, and what its subgraphs take from around them, read values under their new names."""
    for index, value in enumerate(node.input):
        node.input[index] = renamed.get(value, value)
    for subgraph in subgraphs(node):
        own = {value for inner in subgraph.node for value in inner.output}
        own |= {value.name for value in subgraph.input} | {tensor.name for tensor in subgraph.initializer}
        outer = {old: new for old, new in renamed.items() if old not in own}
        for inner in subgraph.node:
            _rename(inner, outer)
        for output in subgraph.output:
            output.name = outer.get(output.name, output.name)


def _code_range(grid: TensorQuant, bounds: tuple[float | None, float | None]) -> tuple[int, int]:
    """The codes that a grid uses for floats within bounds."""
    low, high = (None if bound is None else int(quantize(np.array(bound, np.float32), grid)) for bound in bounds)
    return grid.spec.qmin if low is None else low, grid.spec.qmax if high is None else high


def _off_tie(shift: float, grid: TensorQuant) -> float:
    """A shift of a grid of 255 steps from 0 to 1, moved by 1/256 step where it lies between two codes, to the one that `quantize` takes.

    That of a hard swish does, and all that is near 0 then falls where it is added in front of rounding: to another code in ONNX Runtime's
    kernel than in the file.
    """
    place = shift * 255
    if abs(place - np.floor(place) - 0.5) > 1e-3:
        return shift
    return shift + np.sign(float(quantize(np.array(shift, np.float32), grid)) - place) / 256 / 255


def _has_ties(origin: TensorQuant, grid: TensorQuant) -> bool:
    """Whether a code of one grid lies halfway between two of another, as far as a few roundings in float32 can tell."""
    ratio = float(origin.scale) / float(grid.scale)
    codes = np.arange(origin.spec.qmin, origin.spec.qmax + 1, dtype=np.float64)
    places = (codes - float(origin.zero_point)) * ratio + float(grid.zero_point)
    places = places[(places > grid.spec.qmin - 1) & (places < grid.spec.qmax + 1)]  # what is farther outside saturates in any case
    largest = ratio * (np.abs(codes).max() + abs(float(origin.zero_point))) + abs(float(grid.zero_point))
    return bool((np.abs(places - np.floor(places) - 0.5) < 8 * np.finfo(np.float32).eps * largest).any())
