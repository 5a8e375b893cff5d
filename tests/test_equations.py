"""Einsum as MatMul: what a product of matrices is, and that it computes the same."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.equations import Terms, multiply_matrices, terms_of
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.samples import Samples

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def einsum(equation: str, left: tuple[int | str, ...], right: np.ndarray | tuple[int | str, ...], ends: str = "xw") -> onnx.ModelProto:
    """One Einsum of the input x and of a constant, or a second input w; `ends` is their order."""
    inputs: dict[str, Sequence[int | str]] = {"x": left} if isinstance(right, np.ndarray) else {"x": left, "w": right}
    b = zoo.Builder(inputs)
    if isinstance(right, np.ndarray):
        b.constant("w", right)
    return b.model(b.op("Einsum", *ends, equation=equation))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def same(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *expected: str) -> onnx.ModelProto:
    """The model with its Einsum rewritten: of these operators, valid, and with the result it had."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    multiply_matrices(changed)
    onnx.checker.check_model(changed, full_check=True)
    assert kinds(changed) == list(expected)
    names = [output.name for output in model.graph.output]
    wanted, found = (runtime.execute(runtime.session(one), feeds, names) for one in (model, changed))
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        # Float32 sums in another order: 2^-24 for each of at most 24 addends, of numbers around 1, and those that multiply them.
        np.testing.assert_allclose(found[name], array, atol=1e-5, rtol=1e-5)
    return changed


@pytest.mark.parametrize(
    ("equation", "shape", "weight", "expected"),
    [
        ("abc,cde->abde", (2, 5, 6), (6, 3, 4), ["MatMul", "Reshape"]),  # Keras: the projections of an attention
        ("abcd,cde->abe", (2, 5, 3, 4), (3, 4, 6), ["Reshape", "MatMul"]),  # and what joins its heads
        ("bld,vd->blv", (2, 5, 6), (9, 6), ["MatMul"]),  # tied to an embedding
        ("bhnd,hde->bhne", (2, 3, 5, 4), (3, 4, 6), ["MatMul"]),  # a matrix for each head
        ("bnhd,hde->bnhe", (2, 5, 3, 4), (3, 4, 6), ["Transpose", "MatMul", "Transpose"]),
        ("nij,ik->njk", (2, 6, 5), (6, 4), ["Transpose", "MatMul"]),
        ("...d,de", (2, 5, 6), (6, 4), ["MatMul"]),
        ("bd,ed", (2, 6), (4, 6), ["MatMul"]),  # the result is not written: be
        ("bchw,oc->bohw", (2, 6, 3, 4), (5, 6), ["Transpose", "MatMul", "Transpose"]),
        ("bghd,hdge->bge", (2, 3, 4, 5), (4, 5, 3, 6), ["Transpose", "Reshape", "MatMul", "Transpose"]),  # groups
    ],
)
def test_a_constant_is_laid_out_as_a_matrix(equation: str, shape: tuple[int, ...], weight: tuple[int, ...], expected: list[str]) -> None:
    changed = same(einsum(equation, ("N", *shape[1:]), normal(*weight)), {"x": normal(*shape)}, *expected)
    constants = [tensor for tensor in changed.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert len(constants) == 1  # the one that it was laid out from is gone
    assert changed.graph.node[-1].output[0] == changed.graph.output[0].name


@pytest.mark.parametrize(
    ("equation", "left", "right", "expected"),
    [
        ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 7, 3, 4), ["Transpose", "Transpose", "MatMul"]),  # scores of an attention
        ("bhqk,bkhd->bqhd", (2, 3, 5, 7), (2, 7, 3, 4), ["Transpose", "MatMul", "Transpose"]),  # and what they choose
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 5), ["MatMul"]),
        ("...ij,...kj", (2, 3, 4), (2, 5, 4), ["Transpose", "MatMul"]),
        ("bqhd,qkd->bhqk", (2, 5, 3, 4), (5, 7, 4), ["Transpose", "MatMul", "Transpose"]),  # relative positions
        ("...ij,kj->...ik", (2, 6, 3, 4), (5, 4), ["Transpose", "MatMul"]),
    ],
)
def test_of_two_values(equation: str, left: tuple[int, ...], right: tuple[int, ...], expected: list[str]) -> None:
    feeds = {"x": normal(*left), "w": normal(*right)}
    same(einsum(equation, ("N", *left[1:]), (f"N{right[0]}", *right[1:])), feeds, *expected)


def test_axes_of_unknown_lengths() -> None:
    model = einsum("bqhd,bkhd->bhqk", ("N", "queries", 3, 4), ("N", "keys", 3, 4))
    same(model, {"x": normal(2, 5, 3, 4), "w": normal(2, 7, 3, 4)}, "Transpose", "Transpose", "MatMul")
    model = einsum("bld,dhe->bhle", ("N", "length", 6), normal(6, 3, 4))
    same(model, {"x": normal(2, 5, 6)}, "MatMul", "Reshape", "Transpose")


def test_a_constant_on_the_left_and_one_that_something_else_reads() -> None:
    left = einsum("oc,bcl->bol", ("N", 6, 5), normal(4, 6), ends="wx")
    same(left, {"x": normal(2, 6, 5)}, "Transpose", "MatMul", "Transpose")
    b = zoo.Builder({"x": ["N", "length", 6]})
    words = b.constant("words", normal(9, 6))
    index = b.constant("index", np.array([1, 4]))
    once, again = (b.op("Einsum", "x", words, equation="bld,vd->blv") for _ in range(2))
    changed = same(b.model(once, again, b.op("Gather", words, index)), {"x": normal(2, 5, 6)}, "MatMul", "MatMul", "Gather")
    assert [tensor.name for tensor in changed.graph.initializer] == ["words", "index", "words_matrix"]


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bii,ij->bij", (2, 3, 3), (3, 4)),  # a diagonal
        ("bij,jk->bk", (2, 3, 4), (4, 5)),  # a sum of one operand alone
        ("bij,ij->bij", (2, 3, 4), (3, 4)),  # by element
        ("bi,jk->bijk", (2, 3), (4, 5)),  # outer
        ("bij,j->bi", (2, 3, 4), (4,)),  # a vector
        ("hd,hde->he", (3, 4), (3, 4, 5)),  # one row for each matrix
        ("bij,jk->bik", (2, 3, 1), (4, 5)),  # of one column, which is repeated
    ],
)
def test_what_is_no_product_of_matrices_stays(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    model = einsum(equation, left, normal(*right))
    if equation != "bij,jk->bik" or left[2] == right[0]:
        same(model, {"x": normal(*left)}, "Einsum")
    else:
        multiply_matrices(model)
        assert kinds(model) == ["Einsum"]


def test_more_operands_and_equations_that_cannot_be_read_stay() -> None:
    assert terms_of("ij,jk,kl->il", [2, 2, 2]) is None
    assert terms_of("...j,jk->...k", [None, 2]) is None
    assert terms_of("...ijk,jk", [2, 2]) is None
    assert terms_of(" b i j , j k ", [3, 2]) == Terms("bij", "jk", "bik")


@st.composite
def equations(draw: st.DrawFn, is_weight: bool) -> tuple[str, dict[str, int]]:
    """Any product of two operands, and the length of each axis."""
    many = {"stacked": (0, 2), "summed": (1, 2 if is_weight else 1), "rows": (1, 2), "columns": (1, 2)}
    counts = {kind: draw(st.integers(*span)) for kind, span in many.items()}
    if not is_weight and counts["rows"] > 1:
        counts["columns"] = 1
    letters = iter(draw(st.permutations("abcdefgh")))
    axes = {kind: [next(letters) for _ in range(count)] for kind, count in counts.items()}
    left, right, result = (
        "".join(draw(st.permutations(axes["stacked"] + axes[one] + axes[other])))
        for one, other in (("rows", "summed"), ("summed", "columns"), ("rows", "columns"))
    )
    lengths = {axis: draw(st.integers(2, 4)) for some in axes.values() for axis in some}
    return f"{left},{right}->{result}", lengths


@settings(max_examples=60)
@given(equations(is_weight=True), st.booleans())
def test_any_product_with_a_constant(found: tuple[str, dict[str, int]], is_open: bool) -> None:
    equation, lengths = found
    left, right = ([lengths[axis] for axis in axes] for axes in equation.partition("->")[0].split(","))
    model = einsum(equation, tuple(f"D{place}" for place in range(len(left))) if is_open else tuple(left), normal(*right))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    multiply_matrices(changed)
    assert kinds(changed).count("MatMul") == 1
    same(model, {"x": normal(*left)}, *kinds(changed))


@settings(max_examples=60)
@given(equations(is_weight=False))
def test_any_product_of_two_values(found: tuple[str, dict[str, int]]) -> None:
    equation, lengths = found
    left, right = (tuple(lengths[axis] for axis in axes) for axes in equation.partition("->")[0].split(","))
    model = einsum(equation, left, right)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    multiply_matrices(changed)
    assert set(kinds(changed)) <= {"Transpose", "MatMul"}
    same(model, {"x": normal(*left), "w": normal(*right)}, *kinds(changed))


def test_an_attention_of_equations_runs_on_integers(tmp_path: Path) -> None:
    """As Keras writes it."""
    b = zoo.Builder({"x": ["N", 6, 16]})
    query, key, value = (b.op("Einsum", "x", b.weight(name, (16, 4, 8), 16), equation="abc,cde->abde") for name in ("q", "k", "v"))
    scores = b.op("Einsum", key, b.op("Mul", query, b.constant("scale", np.array(8**-0.5, np.float32))), equation="aecd,abcd->acbe")
    chosen = b.op("Einsum", b.op("Softmax", scores), value, equation="acbe,aecd->abcd")
    y = b.op("Einsum", chosen, b.weight("o", (4, 8, 16), 32), equation="abcd,cde->abe")
    model = b.model(b.op("MatMul", b.op("Relu", y), b.weight("last", (16, 5), 16)))
    source = zoo.loaded(model, tmp_path)
    samples = Samples({"x": normal(32, 6, 16)})
    found = quantize(source, samples, Config(algorithm="minmax", weight_bits=8, activation_bits=8, device="cpu"))
    assert len(found.placement.weights) == 5
    assert not found.placement.floats
    write_model(export_qdq(source.model, found.table), tmp_path / "quantized.onnx")
    executed = {node.op_type for node in runtime.optimized(tmp_path / "quantized.onnx").node}
    assert not {"Einsum", "MatMul", "FusedMatMul"} & executed
    wanted, given = (runtime.run(runtime.session(one), samples.inputs) for one in (model, tmp_path / "quantized.onnx"))
    assert all(sqnr(array, given[name]) > 25 for name, array in wanted.items())  # 8 bits


def test_a_constant_of_what_stays_has_a_row(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6, 16]})
    x = b.op("MatMul", "x", b.weight("first", (16, 16), 16))
    model = b.model(b.op("MatMul", b.op("Einsum", x, b.weight("w", (6, 16), 1), equation="bij,ij->bij"), b.weight("last", (16, 5), 16)))
    source = zoo.loaded(model, tmp_path)
    found = quantize(source, Samples({"x": normal(8, 6, 16)}), Config(algorithm="minmax", device="cpu"))
    assert [(row.op_type, row.reason) for row in found.placement.floats] == [("Einsum", "no integer form of its equation is supported")]
