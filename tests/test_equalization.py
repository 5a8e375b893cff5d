"""Equalization: the same results in float, whatever the shape of the graph, and less noise once it is quantized."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from exporters import export_qdq
from tests import zoo
from toolchain import large, runtime
from toolchain.cli import main
from toolchain.config import Config
from toolchain.diagnosis import diagnose
from toolchain.equalization import Equalized, equalize
from toolchain.errors import UsageError
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.samples import Samples
from toolchain.source import SourceModel
from toolchain.suggestions import suggestions

WIDTH = 16
EQUAL = 100.0  # dB: float32 rounds at about 140, and sums over 16 channels in another scale lose a few
W8A8 = Config(weight_bits=8, activation_bits=8, first_last_bits="same", algorithm="mse", device="cpu")
NORMS = ["LayerNormalization", "RMSNormalization", "decomposed", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"]
SHIFTED = ("LayerNormalization", "SkipLayerNormalization")
FUSED: dict[str, Any] = {"domain": "com.microsoft"}
TOKENS = Samples({"x": np.random.default_rng(5).normal(size=(24, 6, WIDTH)).astype(np.float32)})


def encoder(
    norm: str = "LayerNormalization", residual: bool = False, readers: Sequence[str] = ("MatMul",), spread: float = 30.0, shared: str = ""
) -> onnx.ModelProto:
    """A normalization whose channels differ by up to `spread`, and what reads it; with `residual` its result is added too."""
    b = zoo.Builder({"x": ["N", 6, WIDTH]}, opset=23 if norm == "RMSNormalization" else 17, ir_version=11 if norm[0] == "R" else 8)
    rng = np.random.default_rng(2)
    scale = np.ones(WIDTH, np.float32)
    scale[[3, 11]] = spread, spread / 3
    gamma, beta = b.constant("gamma", scale), b.constant("beta", rng.normal(size=WIDTH).astype(np.float32) * scale)
    if norm == "decomposed":
        root = b.op("Sqrt", b.op("ReduceMean", b.op("Mul", "x", "x"), axes=[-1]))
        value = b.op("Add", b.op("Mul", gamma, b.op("Div", "x", root)), beta, name="normed")
    else:
        is_skip = norm.startswith("Skip")
        given = ["x", *([b.op("Tanh", "x")] if is_skip else []), gamma, *([beta] if norm in SHIFTED else [])]
        value = b.op(norm, *given, name="normed", **FUSED if is_skip else {})
    results = []
    for position, kind in enumerate(readers):
        weight = b.weight(f"w{position}", (WIDTH, WIDTH), WIDTH)
        if kind == "Gemm":
            flat = b.op("Reshape", value, b.constant(f"flat{position}", np.array([-1, WIDTH], np.int64)))
            back = b.op("Gemm", flat, weight, transB=1)
            results.append(b.op("Reshape", back, b.constant(f"back{position}", np.array([-1, 6, WIDTH], np.int64))))
        else:
            results.append(b.op("MatMul", value, weight))
    if shared == "weight":
        results.append(b.op("MatMul", "x", "w0"))
    if shared == "gamma":
        results.append(b.op("Mul", "x", gamma))
    total = results[0]
    for other in [*results[1:], *([value] if residual else [])]:
        total = b.op("Add", total, other)
    return b.model(total)


def outputs(model: onnx.ModelProto, samples: Samples = TOKENS) -> dict[str, np.ndarray]:
    return runtime.run(runtime.session(model), samples.inputs)


def noise(source: SourceModel, float_outputs: dict[str, np.ndarray], config: Config = W8A8) -> float:
    """The worst SQNR of a quantized file, run as it is written, against the outputs of the float model."""
    file = export_qdq(source.model, quantize(source, TOKENS, config).table)
    found = runtime.run(runtime.session(file, optimization=runtime.Optimization.NONE), TOKENS.inputs)
    return min(sqnr(wanted, found[name]) for name, wanted in float_outputs.items())


def changed(source: SourceModel, found: Equalized) -> set[str]:
    """The constants of the source whose values are others afterwards."""
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    return {name for name, array in source.constants.items() if not np.array_equal(array, after[name])}


@settings(max_examples=15, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    residual=st.booleans(),
    readers=st.lists(st.sampled_from(["MatMul", "Gemm"]), min_size=1, max_size=3),
    spread=st.sampled_from([1.0, 30.0, 1e4]),
    shared=st.sampled_from(["", "weight", "gamma"]),
    bits=st.sampled_from([(8, 8), (4, 8), (4, 4), (8, 16)]),
)
def test_an_equalized_model_is_the_same_in_float_and_takes_the_least_error(
    tmp_path_factory: pytest.TempPathFactory,
    norm: str,
    residual: bool,
    readers: list[str],
    spread: float,
    shared: str,
    bits: tuple[int, int],
) -> None:
    source = zoo.loaded(encoder(norm, residual, readers, spread, shared), tmp_path_factory.mktemp("law"))
    found = equalize(source, TOKENS, Config(weight_bits=bits[0], activation_bits=bits[1], first_last_bits="same"))
    wanted, got = outputs(source.model), outputs(found.model)
    assert all(sqnr(wanted[name], got[name]) > EQUAL for name in wanted)
    assert found.agreement > EQUAL
    if not norm.startswith("Skip"):  # ONNX infers no shapes behind it, and asks for that of the output
        onnx.checker.check_model(found.model, full_check=True)
    for choice in found.choices:
        least = min(choice.errors.values())
        assert choice.changes == (least <= 0.8 * choice.errors[0.0] and least < choice.errors[0.0])
        assert choice.changes == (set(choice.factors) != {1.0})
        assert not choice.changes or choice.errors[choice.strength] == least


@pytest.mark.parametrize("norm", NORMS)
def test_where_only_layers_read_the_value_constants_alone_change(tmp_path: Path, norm: str) -> None:
    source = zoo.loaded(encoder(norm, readers=["MatMul", "MatMul"]), tmp_path)
    found = equalize(source, TOKENS, W8A8)
    assert found.choices[0].changes
    assert [n.SerializeToString() for n in found.model.graph.node] == [n.SerializeToString() for n in source.model.graph.node]
    assert changed(source, found) == {"gamma", "w0", "w1", *(["beta"] if norm in (*SHIFTED, "decomposed") else [])}


@pytest.mark.parametrize(("residual", "shared"), [(True, ""), (False, "gamma")])
def test_what_else_reads_the_value_or_its_constants_reads_what_it_read(tmp_path: Path, residual: bool, shared: str) -> None:
    source = zoo.loaded(encoder(residual=residual, shared=shared), tmp_path)
    found = equalize(source, TOKENS, W8A8)
    assert changed(source, found) == {"w0"}
    copies = [node for node in found.model.graph.node if "normed_equalized" in node.output]
    assert [(node.op_type, node.input[0]) for node in copies] == [("Mul", "normed")]
    assert [node.op_type for node in found.model.graph.node if "normed_equalized" in node.input] == ["MatMul"]


def test_a_weight_that_others_read_stays(tmp_path: Path) -> None:
    source = zoo.loaded(encoder(shared="weight"), tmp_path)
    found = equalize(source, TOKENS, W8A8)
    assert found.choices == ()
    assert found.model.graph == source.model.graph


@pytest.mark.parametrize("residual", [False, True])
def test_the_quantized_file_has_less_noise(tmp_path: Path, residual: bool) -> None:
    """Two channels of 30 and 10 times the rest: at least 3 dB, where 4 to 6 were seen."""
    source = zoo.loaded(encoder(residual=residual, readers=["MatMul", "MatMul"]), tmp_path)
    wanted = outputs(source.model)
    found = equalize(source, TOKENS, W8A8)
    onnx.save(found.model, tmp_path / "equalized.onnx")
    assert noise(zoo.loaded(found.model, tmp_path), wanted) > noise(source, wanted) + 3.0


def test_diagnose_suggests_it_where_the_inputs_from_normalizations_make_the_noise(tmp_path: Path) -> None:
    source = zoo.loaded(encoder(), tmp_path)
    found = equalize(source, TOKENS, W8A8)

    def suggested(one: SourceModel) -> list[str]:
        file = export_qdq(one.model, quantize(one, TOKENS, W8A8).table)
        return [text for text in suggestions(diagnose(one, file, TOKENS, tried=0)) if "equalize" in text]

    (text,) = suggested(source)
    assert re.match(r"mrecg-onnx equalize, and quantize what it writes: \d\d % of the rounding noise", text)
    assert suggested(zoo.loaded(found.model, tmp_path)) == []


@pytest.mark.parametrize(("target", "residual", "groups"), [("qnn", True, 0), ("qnn", False, 1), ("ort-cpu", True, 1)])
def test_what_is_rounded_for_others_gets_no_scaled_copy(tmp_path: Path, target: str, residual: bool, groups: int) -> None:
    """Where sums are on integers too, a copy would be made of codes."""
    source = zoo.loaded(encoder(residual=residual), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, first_last_bits="same", target=target)
    assert len(equalize(source, TOKENS, config).choices) == groups


@pytest.mark.parametrize("residual", [False, True])
def test_layers_behind_rearrangements_count(tmp_path: Path, residual: bool) -> None:
    """A linear layer on tokens that are folded into the first axis, as exports for one sample have them."""
    source = zoo.loaded(encoder(residual=residual, readers=["Gemm", "MatMul"]), tmp_path)
    found = equalize(source, TOKENS, W8A8)
    (choice,) = found.choices
    assert choice.group.weights == {"w0": 1, "w1": 0}
    assert changed(source, found) == {"w0", "w1"} | (set() if residual else {"gamma", "beta"})


def test_a_rearrangement_of_the_channels_themselves_is_left(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", WIDTH, WIDTH]})
    value = b.op("LayerNormalization", "x", b.constant("gamma", np.linspace(1, 40, WIDTH, dtype=np.float32)))
    turned = b.op("Transpose", value, perm=[0, 2, 1])
    source = zoo.loaded(b.model(b.op("MatMul", turned, b.weight("w", (WIDTH, WIDTH), WIDTH))), tmp_path)
    samples = Samples({"x": np.random.default_rng(1).normal(size=(8, WIDTH, WIDTH)).astype(np.float32)})
    assert equalize(source, samples, W8A8).choices == ()


def test_the_command_writes_a_model_that_quantize_takes(tmp_path: Path) -> None:
    onnx.save(encoder(residual=True), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=TOKENS.inputs["x"])
    at = [str(tmp_path / "net.onnx"), "--calibration-data", str(tmp_path / "x.npz"), "-p", "w8a8"]
    first = CliRunner().invoke(main, ["equalize", *at, "--first-last-bits", "same"])
    assert first.exit_code == 0, first.output
    assert "1 of 1 values equalized, 1 of them by a Mul" in " ".join(first.output.split())
    again = CliRunner().invoke(main, ["equalize", *at])
    assert again.exit_code == 2
    assert "exists; give --overwrite" in again.output
    at[0] = str(tmp_path / "net.equalized.onnx")
    result = CliRunner().invoke(main, ["quantize", *at, "--algorithm", "mse", "-o", str(tmp_path / "q.onnx")])
    assert result.exit_code == 0, result.output


def test_a_model_without_normalizations_is_said_to_have_none(tmp_path: Path) -> None:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=zoo.images(8).inputs["x"])
    found = CliRunner().invoke(main, ["equalize", str(tmp_path / "net.onnx"), "--calibration-data", str(tmp_path / "x.npz")])
    assert found.exit_code == 0, found.output
    assert "nothing to equalize" in found.output


def test_weights_may_be_outside_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OUTSIDE", 500)
    monkeypatch.setattr(large, "LIMIT", 1000)
    onnx.save(encoder(residual=True), tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=64)
    np.savez(tmp_path / "x.npz", x=TOKENS.inputs["x"])
    at = [str(tmp_path / "net.onnx"), "--calibration-data", str(tmp_path / "x.npz"), "-p", "w8a8"]
    found = CliRunner().invoke(main, ["equalize", *at, "--first-last-bits", "same"])
    assert found.exit_code == 0, found.output
    written = tmp_path / "net.equalized.onnx"
    assert written.with_name(f"{written.name}.data").is_file()
    wanted, got = (runtime.run(runtime.session(path), TOKENS.inputs) for path in (tmp_path / "net.onnx", written))
    assert all(sqnr(wanted[name], got[name]) > EQUAL for name in wanted)


def test_a_model_that_was_rewritten_is_held_against_its_file(tmp_path: Path) -> None:
    model = encoder(norm="decomposed")
    model.opset_import[0].version = 12
    source = zoo.loaded(model, tmp_path)
    assert source.rewritten is not None
    found = equalize(source, TOKENS, W8A8)
    assert found.notes[-1].startswith(f"{source.rewritten}, and computes what the file says")


def test_bits_that_meet_nothing_are_refused(tmp_path: Path) -> None:
    source = zoo.loaded(encoder(), tmp_path)
    with pytest.raises(UsageError, match="no quantizer meets"):
        equalize(source, TOKENS, replace(W8A8, bits=("LayerNormalization=w8a8",)))


def test_the_command_needs_samples(tmp_path: Path) -> None:
    onnx.save(encoder(), tmp_path / "net.onnx")
    found = CliRunner().invoke(main, ["equalize", str(tmp_path / "net.onnx")])
    assert found.exit_code == 2
    assert "--calibration-data is missing" in found.output
    assert not (tmp_path / "net.equalized.onnx").exists()
