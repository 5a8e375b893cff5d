"""Architectures beyond classifiers: their blocks, and that they are quantized from end to end."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters import export_qdq
from tests import architectures, zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.importing import cut_blocks
from toolchain.islands import find_islands
from toolchain.noise import sqnr
from toolchain.partition import MAX_REGION, Block, Rules, partition
from toolchain.pipeline import quantize
from toolchain.report import coverage
from toolchain.samples import Samples
from toolchain.selection import own_precisions
from toolchain.simulation import simulate
from toolchain.source import SourceModel, infer_types
from toolchain.survey import survey

MODELS = {
    "unet": architectures.unet(),
    "dense": architectures.dense(),
    "pyramid": architectures.feature_pyramid(),
    "inception": architectures.inception(),
    "siamese": architectures.siamese(),
    "vit": architectures.vit(),
    "bert": architectures.bert(),
}


def samples_of(source: SourceModel, count: int = 16, tokens: int = 12) -> Samples:
    rng, arrays = np.random.default_rng(2), {}
    for spec in source.inputs:
        if spec.dtype.kind == "i":
            low, high = (0, 50) if spec.name == "input_ids" else (1, 2)
            arrays[spec.name] = rng.integers(low, high, (count, tokens))
        else:
            arrays |= zoo.images(count, tuple(int(d or 0) for d in spec.sample_shape), int(rng.integers(9)), spec.name).inputs
    if "attention_mask" in arrays:
        arrays["attention_mask"][:, -3:] = 0
    return Samples(arrays)


def blocks_of(model: onnx.ModelProto, folder: Path) -> tuple[SourceModel, tuple[Block, ...]]:
    source = zoo.loaded(model, folder)
    types = infer_types(source, samples_of(source).shapes)
    return source, cut_blocks(source, types, find_islands(source, types), Config())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("unet", [3, 3, 8, 3, 3, 3]),
        ("inception", [1, 7, 7, 7, 1]),
        ("vit", [1, 4, 2, 4, 2, 1]),  # patches | attention | MLP | attention | MLP | classifier
        ("bert", [4, 2, 4, 2, 0]),  # although the mask is alive throughout
        ("siamese", [3, 1, 4, 1]),
    ],
)
def test_blocks(name: str, layers: list[int], tmp_path: Path) -> None:
    _, blocks = blocks_of(MODELS[name], tmp_path)
    assert [len(block.weighted) for block in blocks] == layers


def test_transformer_halves_end_at_their_shortcut(tmp_path: Path) -> None:
    _, blocks = blocks_of(MODELS["vit"], tmp_path)
    for block in blocks[1:5]:
        assert [node.op_type for node in block.nodes if node.op_type != "LayerNormalization"][-1] == "Add"
        assert block.is_residual
        assert len(block.inputs) == len(block.outputs) == 1


@pytest.mark.parametrize("name", MODELS)
def test_blocks_stay_of_useful_size(name: str, tmp_path: Path) -> None:
    source, blocks = blocks_of(MODELS[name], tmp_path)
    assert max(len(block.weighted) for block in blocks) <= MAX_REGION
    assert len(blocks) >= len(source.graph.weighted) / 7


@pytest.mark.parametrize("layers", [6, 12])
def test_depth_changes_nothing_about_a_transformer_layer(layers: int, tmp_path: Path) -> None:
    _, blocks = blocks_of(architectures.bert(layers), tmp_path)
    assert [len(block.weighted) for block in blocks] == [4, 2] * layers + [0]


@pytest.mark.parametrize("name", MODELS)
def test_quantized_from_end_to_end(name: str, tmp_path: Path) -> None:
    source = zoo.loaded(MODELS[name], tmp_path)
    samples = samples_of(source)
    config = Config(device="cpu", iterations=5, batch_size=8, weight_bits=8, activation_bits=8)
    quantized = quantize(source, samples, config)
    assert quantized.import_error < 1e-4
    assert not quantized.islands
    layers = coverage(source, quantized.table)
    assert layers["layers_quantized"] == layers["layers"]
    outputs = runtime.run(runtime.session(export_qdq(source.model, quantized.table)), samples.inputs)
    floats = runtime.run(runtime.session(source.model), samples.inputs)
    simulated = simulate(source, quantized.table, samples, torch.device("cpu"), quantized.islands)
    for output, expected in floats.items():
        assert sqnr(expected, outputs[output]) > 15  # 8 bits through as many as 27 layers of random weights
        assert sqnr(simulated[output], outputs[output]) > sqnr(expected, outputs[output]) - 4  # see the command line's parity margin


def test_shared_weights_are_learned_once(tmp_path: Path) -> None:
    source = zoo.loaded(MODELS["siamese"], tmp_path)
    quantized = quantize(source, samples_of(source), Config(device="cpu", iterations=5, batch_size=8, first_last_bits="same"))
    learned = [
        name for result in quantized.results for name, grid in result.changes.items() if grid.codes is not None and grid.spec.bits == 4
    ]
    assert len(learned) == len(set(learned))
    assert all(quantized.table[name].codes is not None for name in ("w0", "w1", "w2", "w3"))
    (note,) = quantized.notes
    assert "learned with the first that reads them: 'w0' with b00, not b01" in note


def test_boundaries_end_blocks(tmp_path: Path) -> None:
    source, blocks = blocks_of(MODELS["inception"], tmp_path)
    inside = blocks[1].nodes[3].outputs[0]
    types = infer_types(source, samples_of(source).shapes)
    cut = partition(source.graph, Rules(types.batched, types.shared, boundaries=[inside]))
    assert inside in {value for block in cut for node in block.nodes[-1:] for value in node.outputs}
    assert [node for block in cut for node in block.nodes] == list(source.graph.nodes)


def test_bits_of_single_nodes(tmp_path: Path) -> None:
    source = zoo.loaded(MODELS["unet"], tmp_path)
    middle = source.graph.weighted[6]
    config = Config(device="cpu", algorithm="minmax", bits=("ConvTranspose=w8a8", f"{middle.name}=w6a16", f"{middle.name}=w5a6"))
    assert own_precisions(source.graph, config.own_bits)[middle.name].weight_bits == 5  # later entries win
    table = quantize(source, samples_of(source), config).table
    source = source.with_copies(table.copies)
    bits = {node.name: (table[node.inputs[1]].spec.bits, table[node.inputs[0]].spec.bits) for node in source.graph.weighted}
    assert bits[middle.name] == (5, 6)
    ups = [node.name for node in source.graph.weighted if node.op_type == "ConvTranspose"]
    assert {bits[name] for name in ups} == {(8, 8)}  # no integer kernel, whose products could saturate
    edges = {source.graph.weighted[0].name, source.graph.weighted[-1].name}
    assert {bits[node.name][0] for node in source.graph.weighted if node.name not in {middle.name, *ups, *edges}} == {4}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("MaxPool", r"selects nodes \(MaxPool\) that no quantizer meets"),
        ("Relu", r"\(Relu\) that no quantizer meets, .* they matter to Concat, Conv, ConvTranspose"),
        ("node_maxpool[24]", r"did you mean 'node_"),
        ("Con", "matches no node name and no operator type"),
    ],
)
def test_bits_that_change_nothing_are_refused(pattern: str, message: str, tmp_path: Path) -> None:
    source = zoo.loaded(MODELS["unet"], tmp_path)
    config = Config(device="cpu", algorithm="minmax", bits=(f"{pattern}=w8a8",))
    with pytest.raises(UsageError, match=message):
        survey(source, samples_of(source), config)
