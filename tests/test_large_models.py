"""Weights outside the protobuf: read where they are, and written beside the graph where one protobuf cannot hold them."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters import export_qdq
from tests import zoo
from toolchain import large, runtime
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.source import load_source


@pytest.mark.parametrize("limit", [large.LIMIT, 1000], ids=["small", "beyond the limit"])
def test_models_with_external_data(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LIMIT", limit)
    samples, config = zoo.images(8), Config(device="cpu", algorithm="minmax", weight_bits=8, activation_bits=8)
    inside = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    path = tmp_path / "outside.onnx"
    onnx.save(zoo.tiny_resnet(), path, save_as_external_data=True, location="outside.bin", size_threshold=64)
    assert path.stat().st_size < (tmp_path / "model.onnx").stat().st_size
    outside = load_source(path)
    assert outside.graph == inside.graph
    models = [export_qdq(source.model, quantize(source, samples, config).table) for source in (inside, outside)]
    first, second = (runtime.run(runtime.session(model), samples.inputs) for model in models)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_storing_leaves_the_model_alone_and_loses_nothing(tmp_path: Path) -> None:
    model = zoo.tiny_resnet()
    before = model.SerializeToString()
    loaded = onnx.load(large.stored(model, tmp_path))
    assert model.SerializeToString() == before
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert [t.SerializeToString() for t in loaded.graph.initializer] == [t.SerializeToString() for t in model.graph.initializer]
    assert loaded.graph.node == model.graph.node
