"""Steps that are captured once and replayed, with a capture made of torch's operations in place of a CUDA graph.

Like a graph, it holds operations and the memory that they read and write, and nothing of what Python did between them: a number that was
handed over as such, a tensor that was made anew for each step or a branch stays what it was when it was captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests import architectures, zoo
from tests.test_architectures import samples_of
from toolchain import reconstruction, recording, step_learning, units
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.recording import Capture, NotCapturedError, Recorded
from toolchain.source import load_source
from toolchain.torch_import import TorchBlock
from toolchain.unit import Unit


class Operations(TorchDispatchMode):
    """Operations in order, with what they were called with and what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def again(self) -> None:
        """Do them once more, into the same memory."""
        for func, args, kwargs, out in self.done:
            read = {tensor.untyped_storage().data_ptr() for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
            for kept, made in zip(tree_iter(out), tree_iter(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.untyped_storage().data_ptr() not in read:  # neither a view nor in place
                    kept.copy_(made)


class Emulated:
    """Capturing does what it captures here: the first replay is that."""

    def rehearsed(self, function: Callable[[], Any]) -> Any:
        return function()

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Operations() as operations:
            result = function()
        replays = [operations.again]

        def replay() -> None:
            with torch.no_grad():
                replays[-1]()
            replays.append(operations.again)

        replays.append(lambda: None)
        return result, replay


@contextmanager
def capturing(_: torch.Generator) -> Iterator[Capture]:
    yield Emulated()


def learned(folder: Path, model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, is_recorded: bool, **settings: Any) -> Quantized:
    onnx.save(model, folder / "net.onnx")

    def learner(config: Config) -> units.Learner:
        return lambda unit: reconstruction.reconstruct_unit(replace(unit, is_recorded=is_recorded))

    def anneal(optimizer: torch.optim.Optimizer, iteration: int, iterations: int) -> None:
        step_learning.anneal(optimizer, iteration, iterations)
        for group in optimizer.param_groups:  # rates that are tensors are float32
            group["lr"] = group["lr"] if isinstance(group["lr"], torch.Tensor) else float(np.float32(group["lr"]))

    with monkeypatch.context() as patch:
        patch.setattr(recording, "capturing", capturing)
        patch.setattr(reconstruction, "anneal", anneal)
        patch.setattr(units, "learner", learner)
        config = Config(device="cpu", iterations=20, batch_size=4, compile="off", **settings)
        source = load_source(folder / "net.onnx")
        return quantize(source, samples_of(source), config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "brecq"},
        {"algorithm": "adaround"},
        {"cache_dtype": "bfloat16"},
        {"early_stop": 0.9},
        {"keep_probability": 0.3},
        {"amp": "on"},
    ],
    ids=str,
)
def test_replayed_steps_learn_what_steps_learn(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the same operations on the same numbers, coins included."""
    model = zoo.tiny_resnet()
    step_by_step, replayed = (learned(tmp_path, model, monkeypatch, is_recorded, **settings) for is_recorded in (False, True))
    for ours, theirs in zip(replayed.results, step_by_step.results, strict=True):
        np.testing.assert_array_equal(np.array(ours.curve), np.array(theirs.curve), err_msg=ours.unit)
        assert (ours.loss_after, ours.kept, ours.iterations) == (theirs.loss_after, theirs.kept, theirs.iterations)
    for name, grid in step_by_step.table.tensors.items():
        np.testing.assert_array_equal(replayed.table.tensors[name].scale, grid.scale, err_msg=name)
        if grid.codes is not None:
            np.testing.assert_array_equal(replayed.table.tensors[name].codes, grid.codes, err_msg=name)


@pytest.mark.parametrize("model", [zoo.every_rule, architectures.bert, architectures.unet], ids=lambda model: model.__name__)
def test_so_do_other_operators_and_several_outputs(
    model: Callable[[], onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_by_step, replayed = (learned(tmp_path, model(), monkeypatch, is_recorded) for is_recorded in (False, True))
    assert len(replayed.results) >= 2
    assert [(r.loss_before, r.loss_after) for r in replayed.results] == [(r.loss_before, r.loss_after) for r in step_by_step.results]


def test_most_steps_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs each part of a step three times and captures it once: gradients, moves during the warm-up, and moves after it."""
    calls: list[str] = []
    for name in ("differentiate", "move"):
        part = getattr(reconstruction._Step, name)
        monkeypatch.setattr(reconstruction._Step, name, lambda step, *args, name=name, part=part: calls.append(name) or part(step, *args))
    found = learned(tmp_path, zoo.tiny_resnet(), monkeypatch, is_recorded=True)
    assert calls.count("differentiate") == 4 * len(found.results)
    assert calls.count("move") == 8 * len(found.results)


def test_recurrent_layers_that_hand_gradients_on_are_in_training_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuDNN has no gradients of them otherwise."""
    called: list[tuple[bool, bool]] = []
    lstm = torch.lstm

    def spy(x: torch.Tensor, *rest: Any) -> Any:
        called.append((x.requires_grad and torch.is_grad_enabled(), rest[-3]))
        return lstm(x, *rest)

    monkeypatch.setattr(torch, "lstm", spy)
    onnx.save(zoo.recurrent(), tmp_path / "net.onnx")
    quantize(load_source(tmp_path / "net.onnx"), zoo.images(16, (5, 8)), Config(device="cpu", iterations=3, batch_size=4))
    assert set(called) == {(True, True), (False, False)}


def test_host_values_are_copied_to_a_device_once() -> None:
    """To copy them again would wait for the device. They are told apart by what is in them."""
    block = TorchBlock.__new__(TorchBlock)
    object.__setattr__(block, "_copies", {})
    meta = torch.device("meta")
    first, other = (block._placed(torch.tensor(axis), meta) for axis in ([1, 2], [1, 3]))
    assert first.device == meta
    assert block._placed(torch.tensor([1, 2]), meta) is first
    assert block._placed(torch.tensor([[1, 2]]), meta) is not first
    assert other is not first
    assert block._placed(axis := torch.tensor([1, 2]), torch.device("cpu")) is axis


def test_the_emulation_tells() -> None:
    """What these tests stand on: a number stays what it was, a tensor is read anew."""
    number, tensor, out = [1.0], torch.ones(()), torch.zeros(2)
    with_number = Recorded(lambda: out.add_(number[0]), Emulated())
    with_tensor = Recorded(lambda: out.add_(tensor), Emulated())
    for _ in range(5):
        with_number()
        with_tensor()
    number[0] = 100.0
    tensor.fill_(10.0)
    with_number()
    assert out.tolist() == [11.0, 11.0]
    with_tensor()
    assert out.tolist() == [21.0, 21.0]


def test_a_step_that_cannot_be_captured_is_learned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start, with the codes of one that never was to be captured; the report says why."""
    model = zoo.tiny_resnet()
    expected = learned(tmp_path, model, monkeypatch, is_recorded=False)

    class Refusing(Emulated):
        def captured(self, function: Callable[[], Any]) -> Any:
            raise NotCapturedError("operation not permitted when stream is capturing")

    @contextmanager
    def refusing(_: torch.Generator) -> Iterator[Capture]:
        yield Refusing()

    def learner(config: Config) -> units.Learner:
        is_first = []

        def learn(unit: Unit) -> Any:
            is_first.append(unit.is_recorded)
            return reconstruction.reconstruct_unit(replace(unit, is_recorded=len(is_first) % 2 == 1))

        return learn

    monkeypatch.setattr(recording, "capturing", refusing)
    monkeypatch.setattr(units, "learner", learner)
    config = Config(device="cpu", iterations=20, batch_size=4, compile="off")
    source = load_source(tmp_path / "net.onnx")
    found = quantize(source, samples_of(source), config)
    assert len(found.notes) == len(expected.results)
    assert found.notes[0].endswith("without a CUDA graph, which takes longer: operation not permitted when stream is capturing")
    for name, grid in expected.table.tensors.items():
        if grid.codes is not None:
            np.testing.assert_array_equal(found.table.tensors[name].codes, grid.codes, err_msg=name)


def test_after_a_capture_that_failed_no_other_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's memory of that device is between two states: the next capture would fail for another reason than it says."""
    monkeypatch.setattr(recording, "_broken", {torch.device("cpu")})
    with pytest.raises(NotCapturedError, match="an earlier capture failed"), recording.capturing(torch.Generator()):
        pass
