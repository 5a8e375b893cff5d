"""Every combination of weight bits, activation bits, storage and target: it loads and is what was simulated, or is refused with a reason.

The verdicts are the table in `benchmarks/results/formats.md`. To renew it after a wanted change: delete it, run the test, read the
difference.
"""

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.activations import TorchModel
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.grids import calibrate, with_biases
from toolchain.importing import cut_blocks
from toolchain.kernels import check_kernels, check_simulation
from toolchain.pipeline import quantize
from toolchain.placement import place
from toolchain.scheme import TARGETS
from toolchain.simulation import simulated_values
from toolchain.source import SourceModel, infer_types, load_source

TABLE = Path(__file__).parent / "benchmarks" / "results" / "formats.md"
WEIGHTS, ACTIVATIONS, STORAGES = (2, 4, 8, "fp8"), (4, 8, 16, 32), ("fast", "small")
SAMPLES = zoo.images(8)
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulNBits")
_LAYERS = 3


@cache
def small_model(folder: Path) -> tuple[SourceModel, TorchModel]:
    """A convolution, a Gemm and a MatMul, imported once."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.op("Flatten", b.op("GlobalAveragePool", b.conv("x", 3, 32, act="relu")))
    x = b.op("MatMul", x, b.weight("matmul_w", (32, 32), 32))  # a Relu behind it would keep ONNX Runtime 1.31 from fusing MatMulNBits
    model = b.model(b.linear(x, 32, 10))
    source = zoo.loaded(model, folder)
    types = infer_types(source, SAMPLES.shapes)
    return source, TorchModel.of(source, types, cut_blocks(source, types, {}, Config()), torch.device("cpu"))


def verdict(config: Config, folder: Path) -> str:
    """Load and compare one cell; returns the layers on integer kernels, and the bytes of the file."""
    source, model = small_model(folder)
    placement = place(source, model.types, config.scheme, config.precision, frozenset())
    table = calibrate(model, placement, SAMPLES, config).table
    for piece in model.pieces:
        table = with_biases(source, placement, piece.block, table)
    exported = export_qdq(source.model, table, scheme=config.scheme)
    path = folder / "cell.onnx"
    write_model(exported, path)
    kinds = runtime.kernel_counts(path)  # loads with default options, or raises
    check = check_simulation(exported, table, simulated_values(source, table, SAMPLES), SAMPLES.inputs)
    assert check.steps <= 1.0, (config, check)
    deployed = check_kernels(exported, SAMPLES.inputs)
    assert deployed.steps < 2.0, (config, deployed)  # MatMulNBits rounds its input to 8 bits, which moves floats by a little more than one
    integer = sum(kinds[kind] for kind in _INTEGER)
    where = "integer" if integer == _LAYERS else "float" if integer == 0 else f"{integer} of {_LAYERS} integer"
    return f"{where}, {path.stat().st_size / 1000:.1f} kB"


def cell(target: str, weights: int | str, activations: int, storage: str, folder: Path) -> str:
    bits, number_format = (8, "fp8") if weights == "fp8" else (int(weights), "int")
    try:
        config = Config(
            target=target,
            weight_bits=bits,
            activation_bits=activations,
            storage=storage,
            first_last_bits="same",
            algorithm="minmax",
            number_format=number_format,
        )
    except UsageError as error:
        refused = str(error)
    else:
        return verdict(config, folder)
    assert any(remedy in refused for remedy in (": use ", ": add ", "leave"))  # a reason and a remedy
    return "refused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


def test_every_combination_loads_and_agrees_or_is_refused(folder: Path) -> None:
    rows = []
    for target, storage, weights in itertools.product(TARGETS, STORAGES, WEIGHTS):
        cells = [cell(target, weights, activations, storage, folder) for activations in ACTIVATIONS]
        rows.append(f"| {target} | {storage} | {weights} | {' | '.join(cells)} |")
    counts = Counter(entry.split(",")[0] for row in rows for entry in row.strip("| ").split(" | ")[3:])
    assert counts["refused"] < counts.total() / 2
    heads = " | ".join("float activations" if bits == 32 else f"A{bits}" for bits in ACTIVATIONS)
    text = "\n".join(
        [
            "# Formats: what loads, on which kernels, and how large",
            "",
            "Written by `tests/test_formats.py`: a convolution, a MatMul and a Gemm, all at the same bits, executed by ONNX Runtime's CPU",
            "provider with default options. `integer`: every layer on integer kernels (QLinear, or MatMulNBits beside float activations);",
            "`float`: dequantized and computed in float. Every cell that is not refused agreed with the torch simulation on every value",
            "within one step. `fp8`: weights in E4M3, and activations in the column A8; that file is for TensorRT, and ran here without",
            "the fusion of quantizers, which ONNX Runtime breaks on fp8.",
            "",
            f"ONNX Runtime {ort.__version__}",
            "",
            f"| target | storage | weight bits | {heads} |",
            "|" + "---|" * (3 + len(ACTIVATIONS)),
            *rows,
            "",
        ]
    )
    if not TABLE.exists():
        TABLE.write_text(text, encoding="utf-8")
        pytest.fail(f"{TABLE.name} was written anew; run again")
    committed = TABLE.read_text(encoding="utf-8")
    if f"ONNX Runtime {ort.__version__}\n" in committed:  # another version may fuse otherwise
        assert text == committed


@given(
    target=st.sampled_from(sorted(TARGETS)),
    weights=st.integers(2, 8),
    activations=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32]),
    storage=st.sampled_from(STORAGES),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_bits_between_those_of_the_table(target: str, weights: int, activations: int, storage: str, folder: Path) -> None:
    """A sample of all 882 cells, which take minutes: each loads and is what was simulated, or is refused with a reason."""
    cell(target, weights, activations, storage, folder)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("storage", ["fast", "small"])
def test_block_wise_weights(block: int, storage: str, folder: Path) -> None:
    """A last block that is not full (64 on 32 inputs), both layouts, and the fused kernel of ONNX Runtime."""
    config = Config(activation_bits=32, block_size=block, storage=storage, first_last_bits="same", algorithm="mse")
    assert verdict(config, folder).startswith("1 of 3")  # MatMulNBits; it knows neither Gemm nor Conv
    source, model = small_model(folder)
    placement = place(source, model.types, config.scheme, config.precision, frozenset())
    table = calibrate(model, placement, SAMPLES, config).table
    scales = {name: table[name].scale.shape for name in placement.weights}
    blocks = -(-32 // block)
    assert sorted(scales.values()) == sorted([(32,), (blocks, 32), (10, blocks)])
    name = "matmul_w"
    error = np.abs(table[name].dequantized() - source.constants[name])
    assert (error <= table[name].expanded(error.shape)[0] * 1.001 * 8).all()
    per_channel = calibrate(
        model, place(source, model.types, config.scheme, replace(config.precision, block_size=None), frozenset()), SAMPLES, config
    ).table
    assert np.square(error).sum() < np.square(per_channel[name].dequantized() - source.constants[name]).sum() * 1.05


def test_two_bits_are_packed_where_the_runtime_reads_them(folder: Path) -> None:
    """int2 beside 16-bit and float activations; beside bytes ONNX Runtime would not load it, and the codes go into int4."""
    source, model = small_model(folder)
    types = {}
    for bits in (8, 16, 32):
        config = Config(weight_bits=2, activation_bits=bits, storage="small", first_last_bits="same", algorithm="minmax")
        placement = place(source, model.types, config.scheme, config.precision, frozenset())
        exported = export_qdq(source.model, calibrate(model, placement, SAMPLES, config).table, scheme=config.scheme)
        types[bits] = {
            runtime.onnx.TensorProto.DataType.Name(t.data_type) for t in exported.graph.initializer if t.name.endswith("_w_quantized")
        }
    assert types == {8: {"INT4"}, 16: {"INT2"}, 32: {"INT2"}}


def test_old_opsets_are_raised_for_packed_weights(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(opset=13), tmp_path)
    config = Config(storage="small", algorithm="mse", device="cpu")
    found = quantize(source, zoo.images(8), config)
    exported = export_qdq(source.model, found.table, scheme=config.scheme)
    assert exported.opset_import[0].version == 21
    path = tmp_path / "small.onnx"
    write_model(exported, path)
    runtime.session(path)
    assert load_source(tmp_path / "model.onnx").opset == 13
