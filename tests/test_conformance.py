"""The official ONNX node cases of every operator with a converter, through the import to torch.

Each case runs twice: with all inputs fed, and with all but the first as constants, which is how shapes, axes and weights come in real
models. Cases that expand an operator into a graph of simpler ones run too, where all of those have converters: they are made of the shape
arithmetic that exporters write. Generating the cases is most of the time that this file takes.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from toolchain.errors import UnsupportedModelError
from toolchain.torch_import import TorchBlock
from toolchain.torch_import.converters import CONVERTERS

from .parity import module

# The cases hold float32 results of short sums; some were rounded to six digits.
RTOL, ATOL = 1e-3, 1e-5
HALF = 5e-4  # one unit in the last place of float16 just below 1, for intermediate results that may be rounded or not

EXCLUDED = {
    r"test_batchnorm_\w+_training_mode": ("in training mode", "updates its statistics: not inference"),
    r"test_training_dropout(_default)?(_mask)?": ("in training mode", "random: not inference"),
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": (
        None,
        "the cases align corners to the unrounded output size, ONNX Runtime to the real one, and so does the import",
    ),
}
"""Name pattern -> (what the refusal says, or None where the case runs and differs; why). Entries that would pass fail the test."""

RULES = (
    # Element types outside of the import's range: such nodes are left to ONNX Runtime.
    r"torch does not compute with (bfloat16|float8\w*|float4e2m1|u?int[24]|uint16|uint32|uint64|string|complex\d+)",
    # Modes that change what a node is must be known at import.
    r"computed, not constant",
)
"""Refusals that need no entry above."""

READS = {
    "Compress": "the size of the result follows from the condition",
    "NonZero": "the size of the result follows from the input",
    "ConstantOfShape": "its only input is a shape: on the CPU where it is computed from shapes, fed here",
    "Range": "its inputs are numbers: on the CPU where they are computed from shapes, fed here",
}
"""Operators that must read values while they run, and why."""

CONSTANT_RESULTS = {"Constant", "ConstantOfShape", "EyeLike", "Range", "NonZero", "OneHot", "ArgMax", "ArgMin", "Shape", "Size", "Hardmax"}
"""Operators whose results have no gradient; nor have those of integers and truth values."""

WITHOUT_CASES = {"GlobalLpPool", "SimplifiedLayerNormalization"}
"""Operators with a converter for which there is no case."""


KINDS = {name for domain, name in CONVERTERS if not domain} | {"expanded"}


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @property
    def operators(self) -> frozenset[tuple[str, str]]:
        return frozenset(("" if node.domain == "ai.onnx" else node.domain, node.op_type) for node in self.model.graph.node)


@cache
def cases() -> Mapping[str, tuple[Case, ...]]:
    """The node cases over tensors, by the operator that they are about; those of expansions are under "expanded"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators divide by zero and overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)  # of all operators; onnx 1.20 has no default
    grouped: dict[str, list[Case]] = {}
    for case in found:
        assert case.model is not None
        assert case.data_sets is not None
        inputs, outputs = case.data_sets[0]
        if any(isinstance(value, list | dict) or value is None for value in [*inputs, *outputs]):
            continue  # sequences, maps and optionals are no tensors
        graph = case.model.graph
        named = [
            dict(zip((info.name for info in infos), map(_array, values), strict=True))
            for infos, values in ((graph.input, inputs), (graph.output, outputs))
        ]
        made = Case(case.name, case.model, named[0], named[1])
        if made.operators <= set(CONVERTERS):
            expanded = "_expanded" in case.name or len(graph.node) > 1
            grouped.setdefault("expanded" if expanded else graph.node[0].op_type, []).append(made)
    return {kind: tuple(members) for kind, members in grouped.items()}


def _of(kind: str) -> tuple[Case, ...]:
    """The cases of an operator that the installed onnx knows."""
    if kind not in cases() and not onnx.defs.has(kind):
        pytest.skip(f"onnx {onnx.__version__} does not know {kind}")
    return cases()[kind]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_official_cases(kind: str) -> None:
    if kind in WITHOUT_CASES:
        assert kind not in cases()
        return
    failures: list[str] = []
    computed = 0
    for case in _of(kind):
        names = list(case.inputs)
        for constants in [[], *([names[1:]] if len(names) > 1 else [])]:
            verdict, done = _judge(case, constants)
            computed += done
            if verdict is not None:
                failures.append(f"{case.name} ({'one input' if constants else 'all inputs'} fed): {verdict}")
    assert not failures, "\n".join(failures)
    assert computed, f"every case of {kind} was refused"


@pytest.mark.parametrize("kind", sorted(KINDS - WITHOUT_CASES - set(READS)))
def test_no_value_is_read_while_a_block_runs(kind: str) -> None:
    """With its parameters constant a block runs on a device without memory: what would wait for a device, or mix devices, fails there."""
    for case in _of(kind):
        try:
            block = _module(case, list(case.inputs)[1:]).to("meta")
        except UnsupportedModelError:
            continue
        if _exclusion(case) is not None or re.match(r"test_(range|\w+window)", case.name):  # the latter are ranges up to what is fed
            continue
        values = {name: torch.from_numpy(np.array(case.inputs[name])).to("meta") for name in (*block.block.inputs, *block.weights)}
        made = {name: tuple(tensor.shape) for name, tensor in block(values).items()}
        assert made == {name: array.shape for name, array in case.outputs.items()}, case.name


@pytest.mark.parametrize("kind", sorted(KINDS - WITHOUT_CASES - CONSTANT_RESULTS - {"expanded"}))
def test_gradients_reach_the_first_input(kind: str) -> None:
    for case in _of(kind):
        first = next(iter(case.inputs))
        if case.inputs[first].dtype != np.float32 or next(iter(case.outputs.values())).dtype != np.float32 or not case.inputs[first].size:
            continue
        try:
            block = _module(case, list(case.inputs)[1:])
        except UnsupportedModelError:
            continue
        values = {name: torch.from_numpy(np.array(case.inputs[name])) for name in (*block.block.inputs, *block.weights)}
        x = values[first].requires_grad_()
        block(values)[next(iter(case.outputs))].sum().backward()
        assert x.grad is not None, case.name


def test_every_exclusion_is_about_a_case() -> None:
    names = [case.name for members in cases().values() for case in members]
    for pattern in EXCLUDED:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def _judge(case: Case, constants: Sequence[str]) -> tuple[str | None, bool]:
    """(what is wrong with the import of a case, or None; whether it was computed)."""
    refusal, reason = _exclusion(case) or (None, None)
    try:
        found = _imported(case, constants)
    except UnsupportedModelError as error:
        expected = (*RULES, refusal) if refusal is not None else RULES
        return (None if any(re.search(rule, str(error)) for rule in expected) else str(error)), False
    difference = _difference(found, case.outputs)
    if reason is None:
        return difference, True
    return (f"passes, but is excluded: {reason}" if difference is None or refusal is not None else None), True


def _exclusion(case: Case) -> tuple[str | None, str] | None:
    return next((entry for pattern, entry in EXCLUDED.items() if re.fullmatch(pattern, case.name)), None)


def _imported(case: Case, constants: Sequence[str]) -> dict[str, torch.Tensor]:
    block = _module(case, constants)
    with torch.no_grad():
        return block({name: torch.from_numpy(np.array(case.inputs[name])) for name in (*block.block.inputs, *block.weights)})


def _module(case: Case, constants: Sequence[str]) -> TorchBlock:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    model.graph.initializer.extend(numpy_helper.from_array(case.inputs[name], name) for name in constants)
    return module(model, [name for name in case.inputs if name not in constants])[0]


def _difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, np.ndarray]) -> str | None:
    for name, array in expected.items():
        tensor = found[name].numpy()
        if tensor.dtype != array.dtype or tensor.shape != array.shape:
            return f"{name} is {tensor.dtype}{tensor.shape}, not {array.dtype}{array.shape}"
        atol = HALF if array.dtype == np.float16 else ATOL
        if not np.allclose(tensor.astype(np.float64), array.astype(np.float64), RTOL, atol, equal_nan=True):
            return f"{name} differs by {np.nanmax(np.abs(tensor.astype(np.float64) - array.astype(np.float64)))}"
    return None


def _array(value: object) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
