"""Hard swish and hard sigmoid: one form for all spellings, and integers where the target is ONNX Runtime's CPU provider."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporters import export_qdq, write_model
from exporters.check import check
from exporters.diff import compare
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.kernels import check_kernels
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.samples import Samples
from toolchain.simulation import simulate

SAMPLES = zoo.images(32)
Spelling = Callable[[zoo.Builder, str], str]


def number(b: zoo.Builder, value: float) -> str:
    name = f"number_{value:g}"
    return name if name in {tensor.name for tensor in b.tensors} else b.constant(name, np.array(value, np.float32))


def clipped(b: zoo.Builder, x: str, high: float = 6.0, low: float = 0.0) -> str:
    return b.op("Clip", x, number(b, low), number(b, high))


def paddle(b: zoo.Builder, x: str) -> str:
    return b.op("Div", b.op("Mul", x, clipped(b, b.op("Add", x, number(b, 3)))), number(b, 6))


def keras(b: zoo.Builder, x: str) -> str:
    return b.op("Mul", b.op("Mul", clipped(b, b.op("Add", number(b, 3), x)), number(b, 1 / 6)), x)


def inverse(b: zoo.Builder, x: str) -> str:
    return b.op("Mul", number(b, 1 / 6), b.op("Mul", clipped(b, b.op("Add", x, number(b, 3))), x))


def operator(b: zoo.Builder, x: str) -> str:
    b.opset = 14
    return b.op("HardSwish", x)


def two_operators(b: zoo.Builder, x: str) -> str:
    return b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6))


def gate_of_another(b: zoo.Builder, x: str) -> str:
    """Squeeze and excitation, with the slope in front."""
    inside = b.conv(b.op("GlobalAveragePool", x), 8, 8, kernel=1)
    return b.op("Mul", x, clipped(b, b.op("Add", b.op("Mul", inside, number(b, 0.2)), number(b, 0.5)), 1.0))


def behind_relu(b: zoo.Builder, x: str) -> str:
    """Half of what it reads is 0, where the shift of the gate lies between two codes; what it multiplies is another value."""
    return b.op("Mul", x, b.op("HardSigmoid", b.op("Relu", b.conv(x, 8, 8)), alpha=1 / 6))


SPELLINGS: dict[str, Spelling] = {f.__name__: f for f in (paddle, keras, inverse, operator, two_operators, gate_of_another, behind_relu)}


def network(spelled: Spelling) -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = spelled(b, b.conv("x", 3, 8))
    return b.model(b.head(b.conv(spelled(b, b.conv(y, 8, 8)), 8, 8, act="relu"), 8))


def unchanged(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    wanted, found = (runtime.run(runtime.session(one), SAMPLES.inputs) for one in (model, other))
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, rtol=1e-5)  # a factor of 1/6 for a division by 6, in float32


@pytest.mark.parametrize("name", SPELLINGS)
def test_all_spellings_are_hard_sigmoids(name: str, tmp_path: Path) -> None:
    model = network(SPELLINGS[name])
    source = zoo.loaded(model, tmp_path)
    kinds = Counter(node.op_type for node in source.graph.nodes)
    assert (kinds["HardSigmoid"], kinds["Mul"]) == (2, 2)
    assert not {"Add", "Clip", "Div", "HardSwish"} & kinds.keys()
    unchanged(model, source.model)


def other_bounds(b: zoo.Builder, x: str) -> str:
    return b.op("Div", b.op("Mul", x, clipped(b, b.op("Add", x, number(b, 3)), 5.0)), number(b, 6))


def other_floor(b: zoo.Builder, x: str) -> str:
    return b.op("Div", b.op("Mul", x, clipped(b, b.op("Add", x, number(b, 3)), low=1.0)), number(b, 6))


def by_channel(b: zoo.Builder, x: str) -> str:
    shift = b.constant(f"{x}_shift", np.full((1, 8, 1, 1), 3, np.float32))
    return b.op("Div", b.op("Mul", x, clipped(b, b.op("Add", x, shift))), number(b, 6))


def falling(b: zoo.Builder, x: str) -> str:
    gate = clipped(b, b.op("Add", b.op("Mul", x, number(b, -0.2)), number(b, 0.5)), 1.0)
    return b.op("Add", x, gate)  # so that the factor is not folded into the convolution


def squared(b: zoo.Builder, x: str) -> str:
    gate = clipped(b, b.op("Add", x, number(b, 3)))
    return b.op("Div", b.op("Mul", gate, gate), number(b, 6))


def read_twice(b: zoo.Builder, x: str) -> str:
    shifted = b.op("Add", x, number(b, 3))
    return b.op("Add", b.op("Div", b.op("Mul", x, clipped(b, shifted)), number(b, 6)), shifted)


@pytest.mark.parametrize("spelled", [other_bounds, other_floor, by_channel, squared, read_twice])
def test_what_is_something_else_stays(spelled: Spelling, tmp_path: Path) -> None:
    model = network(spelled)
    source = zoo.loaded(model, tmp_path)
    assert "HardSigmoid" not in {node.op_type for node in source.graph.nodes}
    unchanged(model, source.model)


def two_gates(b: zoo.Builder, x: str) -> str:
    """Two that one product joins, each on a value of its own."""
    one, other = (clipped(b, b.op("Add", b.op("Mul", y, number(b, 0.2)), number(b, 0.5)), 1.0) for y in (x, b.conv(x, 8, 8)))
    return b.op("Mul", one, other)


def one_division(b: zoo.Builder, x: str) -> str:
    return b.op("Div", b.op("Mul", *(clipped(b, b.op("Add", y, number(b, 3))) for y in (x, b.conv(x, 8, 8)))), number(b, 6))


def gate_of_gate(b: zoo.Builder, x: str) -> str:
    """The division of the first looks like the slope of the second."""
    first = b.op("Mul", clipped(b, b.op("Add", x, number(b, 3))), number(b, 1 / 6))
    return b.op("Mul", clipped(b, b.op("Add", first, number(b, 3))), number(b, 1 / 6))


def swish_and_gate(b: zoo.Builder, x: str) -> str:
    return b.op("Mul", clipped(b, b.op("Add", inverse(b, x), number(b, 3))), number(b, 1 / 6))


@pytest.mark.parametrize(("spelled", "count"), [(falling, 2), (two_gates, 4), (one_division, 2), (gate_of_gate, 4), (swish_and_gate, 4)])
def test_gates_that_touch(spelled: Spelling, count: int, tmp_path: Path) -> None:
    model = network(spelled)
    source = zoo.loaded(model, tmp_path)
    assert Counter(node.op_type for node in source.graph.nodes)["HardSigmoid"] == count
    unchanged(model, source.model)


def test_a_value_on_the_way_that_is_handed_out_stays(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8)
    gate = clipped(b, b.op("Add", x, number(b, 3)))
    y = b.op("Div", b.op("Mul", x, gate), number(b, 6))
    model = b.model(b.conv(y, 8, 8), gate)
    source = zoo.loaded(model, tmp_path)
    assert gate in source.graph.producer
    unchanged(model, source.model)


def exported(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[onnx.ModelProto, Counter[str], float]:
    """The file, the operators that ONNX Runtime executes of it, and how the file agrees with the simulation, in dB."""
    source = zoo.loaded(model, folder)
    config = Config(**{"algorithm": "minmax", "weight_bits": 8, "activation_bits": 8, "device": "cpu", **options})
    found = quantize(source, SAMPLES, config)
    file = export_qdq(source.model, found.table, scheme=config.scheme)
    write_model(file, folder / "quantized.onnx")
    simulated = simulate(source, found.table, SAMPLES, torch.device("cpu"), scheme=config.scheme)
    written = runtime.run(runtime.session(file, optimization=runtime.Optimization.NONE), SAMPLES.inputs)
    executed = Counter(node.op_type for node in runtime.optimized(folder / "quantized.onnx").node)
    kernels = check_kernels(file, SAMPLES.inputs)
    assert kernels.steps <= 1
    assert kernels.share < 1  # percent of codes: all of a gate near x = 0 would move if its shift were left on a tie
    assert config.target == "academic" or not [found for found in check(file, config.target) if found.is_error]
    assert not compare(source.model, file).changes
    return file, executed, min(sqnr(simulated[name], array) for name, array in written.items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", SPELLINGS)
def test_they_run_on_integers(name: str, bits: int, tmp_path: Path) -> None:
    _, executed, agreement = exported(network(SPELLINGS[name]), tmp_path, weight_bits=bits, activation_bits=bits)
    copies = 2 if (name, bits) == ("behind_relu", 4) else 0  # a layer reads in 4 bits what the product reads in 8
    assert (executed["QLinearAdd"], executed["QLinearMul"]) == (2 + copies, 2)
    assert not {"HardSigmoid", "Mul", "Add", "Div", "Conv"} & executed.keys()
    assert agreement > 48  # dB: few codes on ties


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (1.0, 0.0), (1.0, 1e-37), (0.05, -0.25), (3.0, 0.9)])
def test_the_codes_are_those_of_the_operator(alpha: float, beta: float, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8)
    gate = b.op("HardSigmoid", x, name="gate", alpha=alpha, beta=beta)
    model = b.model(b.conv(b.op("Mul", x, gate), 8, 8))
    file, executed, _ = exported(model, tmp_path)
    assert "HardSigmoid" not in executed
    scale, zero_point = (numpy_helper.to_array(t) for t in file.graph.initializer if t.name in (f"{x}_scale", f"{x}_zero_point"))
    values = runtime.run_exposed(file, SAMPLES.inputs, [f"{x}_quantized", "gate_quantized"])
    codes = values[f"{x}_quantized"].astype(np.float64) - zero_point
    wanted = np.clip(alpha * codes * scale + beta, 0, 1) * 255
    # Half a step, the 1/256 that a shift on a tie is moved by, and what float32 makes of sums up to 255.
    assert np.abs(values["gate_quantized"] - wanted).max() <= 0.5 + 1 / 256 + 1e-3
    assert set(np.unique(values["gate_quantized"])) >= ({0, 255} if (alpha, beta) == (3.0, 0.9) else set())


@pytest.mark.parametrize(
    "options",
    [
        {"activation_scheme": "symmetric"},  # whose grids do not end at 0
        {"elementwise_bits": 16},  # for which there are no integer kernels
        {"target": "qnn"},
        {"target": "academic"},
    ],
    ids=str,
)
def test_elsewhere_they_stay(options: dict[str, Any], tmp_path: Path) -> None:
    file, _, agreement = exported(network(two_operators), tmp_path, **options)
    assert Counter(node.op_type for node in file.graph.node)["HardSigmoid"] == 2
    assert agreement > 55


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", SPELLINGS)
def test_openvino_gets_hard_swishes_as_it_fuses_them(name: str, bits: int, tmp_path: Path) -> None:
    """With nothing inside on a grid; a gate of another value is an operand, as the value is."""
    file, _, agreement = exported(network(SPELLINGS[name]), tmp_path, target="openvino", weight_bits=bits, activation_bits=bits)
    kinds = Counter(node.op_type for node in file.graph.node)
    producer = {value: node.op_type for node in file.graph.node for value in node.output}
    inside = [producer[value] for node in file.graph.node if node.op_type == "Mul" for value in node.input]
    if name in ("gate_of_another", "behind_relu"):
        assert kinds["HardSigmoid"] == 2
        assert set(inside) == {"DequantizeLinear"}
    else:
        assert (kinds["HardSigmoid"], kinds["Div"], kinds["Mul"]) == (0, 2, 2)
        assert "DequantizeLinear" not in inside
    assert agreement > 90  # float32 sums in another order


def test_names_of_a_hard_swish_that_is_spelled_out(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8], "hard_swish_three": ["N", 1]})
    gate = b.op("HardSigmoid", b.conv("x", 3, 8), name="gate", alpha=1 / 6)
    y = b.op("Mul", b.nodes[-2].output[0], gate, name="product")
    b.op("Identity", y, name="node_gate_shifted")
    b.nodes[-1].name = "node_gate_shifted"
    model = b.model(b.conv("node_gate_shifted", 8, 8), b.op("Exp", "hard_swish_three", name="product_gate"))
    source = zoo.loaded(model, tmp_path)
    samples = Samples({**SAMPLES.inputs, "hard_swish_three": np.ones((32, 1), np.float32)})
    config = Config(algorithm="minmax", device="cpu", target="openvino")
    file = export_qdq(source.model, quantize(source, samples, config).table, scheme=config.scheme)
    runtime.run(runtime.session(file), samples.inputs)
    assert not compare(source.model, file).changes


def test_openvino_gets_silu_without_grids_inside(tmp_path: Path) -> None:
    file, _, _ = exported(network(lambda b, x: b.op("Mul", x, b.op("Sigmoid", x))), tmp_path, target="openvino")
    producer = {value: node.op_type for node in file.graph.node for value in node.output}
    inside = {producer[value] for node in file.graph.node if node.op_type in ("Mul", "Sigmoid") for value in node.input}
    assert inside == {"Conv", "Sigmoid"}


def test_one_that_is_handed_out_or_kept_float_keeps_its_operator(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8)
    gate = b.op("HardSigmoid", x, name="gate")
    model = b.model(b.conv(b.op("Mul", x, gate), 8, 8), gate)
    (tmp_path / "out").mkdir()
    file, _, agreement = exported(model, tmp_path / "out")
    assert [node.op_type for node in file.graph.node].count("HardSigmoid") == 1
    assert agreement > 55
    (tmp_path / "float").mkdir()
    file, executed, _ = exported(network(two_operators), tmp_path / "float", keep_float=("HardSigmoid",))
    assert executed["HardSigmoid"] == 2


def test_what_a_hard_sigmoid_alone_reads_is_dequantized_for_it_alone(tmp_path: Path) -> None:
    file, _, _ = exported(network(gate_of_another), tmp_path)
    read = {value for node in file.graph.node for value in node.input} | {output.name for output in file.graph.output}
    assert all(read.issuperset(node.output) for node in file.graph.node)
