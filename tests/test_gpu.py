"""What only a CUDA device can show: the same codes to within float32 rounding, on the provider that was asked for."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import memory, runtime
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.simulation import simulate
from toolchain.source import load_source
from toolchain.validation import validate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


def learned(path: Path, device: str, iterations: int) -> Quantized:
    config = Config(device=device, iterations=iterations, batch_size=16)
    return quantize(load_source(path), zoo.images(64), config)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_calibration_is_that_of_the_cpu(path: Path) -> None:
    tables = [quantize(load_source(path), zoo.images(64), Config(device=d, algorithm="mse")).table.tensors for d in ("cpu", "cuda")]
    for name, grid in tables[0].items():
        # The grid search compares sums of floats: a candidate range, 1 % of the largest, may win on one device only.
        np.testing.assert_allclose(tables[1][name].scale, grid.scale, rtol=0.03)


def test_reconstruction_learns_and_repeats(path: Path) -> None:
    first, again = (learned(path, "cuda", 100) for _ in range(2))
    assert all(result.loss_after < result.loss_before for result in first.results)
    for name, grid in first.table.tensors.items():
        if grid.codes is not None:
            assert np.mean(again.table.tensors[name].codes != grid.codes) < 0.01  # atomics in cuDNN's backward may flip a close call


def test_activations_in_host_memory_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = learned(path, "cuda", 40)
    monkeypatch.setattr(memory, "_device_room", lambda *_: 0.0)
    far = learned(path, "cuda", 40)
    for name, grid in near.table.tensors.items():
        if grid.codes is not None:
            assert np.mean(far.table.tensors[name].codes != grid.codes) < 0.01  # atomics in cuDNN's backward may flip a close call


def test_the_file_does_what_was_simulated(path: Path, tmp_path: Path) -> None:
    source, samples = load_source(path), zoo.images(64, seed=3)
    found = learned(path, "cuda", 20)
    write_model(export_qdq(source.model, found.table), tmp_path / "q.onnx")
    simulated = simulate(source, found.table, samples, torch.device("cuda"))
    checked = validate(source.model, tmp_path / "q.onnx", samples, path.stat().st_size, "auto", simulated)
    assert checked.provider == runtime.pick_provider("auto")
    assert checked.simulation is not None
    assert checked.simulation.agreement is not None
    assert checked.simulation.agreement >= 95.0  # TF32-free float32; a few of 64 samples may sit on rounding ties
