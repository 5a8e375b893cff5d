"""What only a CUDA device can show: the same codes to within float32 rounding, on the provider that was asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters import export_qdq, write_model
from tests import architectures, zoo
from tests.test_architectures import samples_of
from toolchain import memory, reconstruction, runtime
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.recording import NotCapturedError, Recorded, capturing
from toolchain.simulation import simulate
from toolchain.source import load_source
from toolchain.validation import validate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


def learned(path: Path, device: str, iterations: int, **settings: Any) -> Quantized:
    config = Config(device=device, iterations=iterations, batch_size=16, **settings)
    return quantize(load_source(path), zoo.images(64), config)


def differing(first: Quantized, second: Quantized) -> float:
    """The share of codes of weights that differ."""
    codes = [(grid.codes, second.table.tensors[name].codes) for name, grid in first.table.tensors.items() if grid.codes is not None]
    return float(np.concatenate([np.ravel(ours != theirs) for ours, theirs in codes]).mean())


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
    assert differing(first, again) < 0.01  # atomics in cuDNN's backward may flip a close call


def test_activations_in_host_memory_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = learned(path, "cuda", 40)
    monkeypatch.setattr(memory, "_device_room", lambda *_: 0.0)
    far = learned(path, "cuda", 40)
    assert differing(near, far) < 0.01  # atomics in cuDNN's backward may flip a close call


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


def test_replayed_steps_learn_what_steps_learn(path: Path) -> None:
    """The same kernels on the same numbers, coins included, but for the rates, which are float32; and each unit can be captured."""
    replayed, step_by_step = (learned(path, "cuda", 100, cuda_graphs=graphs) for graphs in ("auto", "off"))
    assert not [note for note in replayed.notes if "CUDA graph" in note]
    assert differing(replayed, step_by_step) < 0.01  # atomics in cuDNN's backward may flip a close call
    for ours, theirs in zip(replayed.results, step_by_step.results, strict=True):
        np.testing.assert_allclose([p.loss for p in ours.curve], [p.loss for p in theirs.curve], rtol=0.05)


def test_a_step_is_replayed_from_the_fourth_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    differentiate = reconstruction._Step.differentiate
    monkeypatch.setattr(reconstruction._Step, "differentiate", lambda step: calls.append(1) or differentiate(step))
    found = learned(path, "cuda", 40)
    assert len(calls) == 4 * len(found.results)


def test_compiled_quantizers_learn_the_same(path: Path) -> None:
    """But where Triton's division, which is not rounded correctly, or its order of sums decides a close call."""
    assert differing(learned(path, "cuda", 100, compile="on", amp="off"), learned(path, "cuda", 100, compile="off")) < 0.02


def test_products_in_bfloat16_learn_as_much(path: Path) -> None:
    """The loss that is left is that of float32 products; noise of 2^-9 moves what is undecided."""
    narrow, exact = (learned(path, "cuda", 100, amp=choice) for choice in ("on", "off"))
    total = [sum(r.loss_after for r in found.results) for found in (narrow, exact)]
    assert total[0] == pytest.approx(total[1], rel=0.25)  # as much as seeds differ


def test_what_cannot_be_captured_is_found_before() -> None:
    """A wait for the device is refused at the call before the capture, with its reason; a graph is captured afterwards as ever."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, before = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    with capturing(generator) as capture:
        waiting = Recorded(lambda: float(x.add_(1.0).sum()), capture)
        assert [waiting(), waiting()] == [16.0, 24.0]
        with pytest.raises(NotCapturedError):
            waiting()
    assert torch.cuda.current_stream() == before
    assert torch.cuda.get_sync_debug_mode() == 0
    x.fill_(0.0)
    with capturing(generator) as capture:
        adding = Recorded(lambda: x.add_(1.0), capture)
        for _ in range(10):
            adding()
    assert x.tolist() == [10.0] * 8


def test_recurrent_layers_learn(tmp_path: Path) -> None:
    """cuDNN takes gradients of its layers in training mode only."""
    onnx.save(zoo.recurrent(), tmp_path / "net.onnx")
    samples = zoo.images(32, (5, 8))
    found = quantize(load_source(tmp_path / "net.onnx"), samples, Config(device="cuda", iterations=20, batch_size=8))
    assert found.results


@pytest.mark.parametrize("model", [architectures.bert, architectures.vit], ids=["bert", "vit"])
def test_transformers_are_captured(model: Any, tmp_path: Path) -> None:
    """Positions and masks that follow from shapes are copied to the device once."""
    onnx.save(model(), tmp_path / "net.onnx")
    source = load_source(tmp_path / "net.onnx")
    found = quantize(source, samples_of(source, 32), Config(device="cuda", iterations=20, batch_size=8))
    assert not [note for note in found.notes if "CUDA graph" in note]
