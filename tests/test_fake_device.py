"""The learning loop on a CUDA device that torch only makes believe: nothing of the host is mixed in, and no step waits for the device.

Fake tensors have shapes and devices but no elements: an operation on two devices is an error, and so is whatever asks for an element (an
`.item()`), which would stall a GPU at every step.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests import zoo
from toolchain import minibatch, reconstruction, recording
from toolchain.activations import Value
from toolchain.compiled import Limits
from toolchain.config import Config
from toolchain.fake_quant import LearnedStep
from toolchain.losses import learnable
from toolchain.packing import Packed
from toolchain.pipeline import quantize
from toolchain.recording import Capture
from toolchain.source import load_source
from toolchain.unit import Learned, Unit

CUDA = torch.device("cuda", 0)


def refusal() -> str | None:
    """Older releases of torch ask the driver about fake CUDA tensors too."""
    try:
        with FakeTensorMode():
            return None if torch.ones(4, device=CUDA)[1:].device == CUDA else "fake tensors have no device"
    except RuntimeError as error:
        return str(error).splitlines()[0]


pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"torch {torch.__version__} cannot make believe a CUDA device: {refusal()}")


class SteppedError(Exception):
    """The loop is done: what follows reads the result."""


def moved(value: Value, mode: FakeTensorMode) -> Value:
    if isinstance(value, Packed):
        kept = moved(value.kept, mode)
        assert isinstance(kept, torch.Tensor)
        return Packed(kept, value.packing)
    return mode.from_tensor(value).to(CUDA) if isinstance(value, torch.Tensor) else value


@contextmanager
def device_made_believe(monkeypatch: pytest.MonkeyPatch, is_recorded: bool) -> Iterator[FakeTensorMode]:
    """Autograd's engine and torch's generators want a real device: gradients become zeros of each parameter, draws come from the host's."""

    def backward(loss: torch.Tensor, **_: Any) -> None:
        ahead, seen = [loss.grad_fn], set()
        while ahead:
            function = ahead.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            leaf = getattr(function, "variable", None)
            if leaf is not None and leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            ahead += [earlier for earlier, _ in function.next_functions]

    def draw(unit: Unit) -> Any:
        made = drawn(replace(unit, device=torch.device("cpu")))
        made.device = CUDA
        return made

    def stop(_: Any) -> bool:
        raise SteppedError

    def adam(*tensors: Any, lr: Any, **_: Any) -> None:
        """The one operation that has no fake of it, where rates are tensors."""
        rates = [lr] if isinstance(lr, torch.Tensor) else []  # that of the rounding never changes
        assert {tensor.device for tensor in itertools.chain(rates, *tensors)} == {CUDA}

    drawn = Unit.draw
    with monkeypatch.context() as patch, FakeTensorMode() as mode:
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(Unit, "draw", draw)
        patch.setattr(minibatch, "output_shares", lambda targets, _: dict.fromkeys(learnable(targets), 1.0))  # read once, before the loop
        patch.setattr(reconstruction, "are_finite", stop)
        patch.setattr(recording, "capturing", capturing)
        if is_recorded:
            patch.setattr(torch, "_fused_adam_", adam)
        patch.setattr(reconstruction, "is_curve_point", lambda *_: False)  # the points of the curve are read, some 40 in all
        yield mode


class Emulated:
    """Graphs want a real device: what is captured here runs once, and replays do nothing."""

    def rehearsed(self, function: Callable[[], Any]) -> Any:
        return function()

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return function(), lambda: None


@contextmanager
def capturing(_: torch.Generator) -> Iterator[Capture]:
    yield Emulated()


def taught(model: onnx.ModelProto, folder: Path, monkeypatch: pytest.MonkeyPatch, is_recorded: bool = False, **settings: Any) -> int:
    """How many units went through the loop on the fake device."""
    onnx.save(model, folder / "net.onnx")
    learn, done = reconstruction._learn, []

    def on_both(unit: Unit, before: Any) -> Learned:
        with device_made_believe(monkeypatch, is_recorded) as mode:
            inputs, floats, targets = (
                {name: moved(value, mode) for name, value in values.items()} for values in (unit.inputs, unit.float_inputs, unit.targets)
            )
            there = replace(unit, inputs=inputs, float_inputs=floats, targets=targets, device=CUDA, is_recorded=is_recorded)
            with pytest.raises(SteppedError):
                learn(there, before)
        done.append(unit)
        return learn(unit, before)

    monkeypatch.setattr(reconstruction, "_learn", on_both)
    quantize(load_source(folder / "net.onnx"), zoo.images(16), Config(device="cpu", iterations=10, batch_size=4, **settings))
    return len(done)


@pytest.mark.parametrize(
    "settings", [{}, {"algorithm": "brecq"}, {"algorithm": "adaround"}, {"cache_dtype": "bfloat16"}, {"amp": "on"}], ids=str
)
def test_the_loop_stays_on_its_device_and_never_waits(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taught(zoo.tiny_resnet(), tmp_path, monkeypatch, **settings) >= 3


def test_so_does_a_step_that_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and the regulariser's weight and exponent are on the device, and Adam's count of steps."""
    assert taught(zoo.tiny_resnet(), tmp_path, monkeypatch, is_recorded=True) >= 3


def test_so_do_other_operators_and_several_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taught(zoo.every_rule(), tmp_path, monkeypatch) >= 3


def test_gradients_stay_on_the_device() -> None:
    with FakeTensorMode():
        x, step = torch.empty(4, 8, device=CUDA), torch.ones((), device=CUDA)
        saved = {
            "saved_tensors": (x, x, step, None),
            "limits": Limits(-8, 7, 0.0, 6.0),
            "is_dropped": True,
            "is_compiled": False,
            "needs_input_grad": (True, True),
        }
        context: Any = type("Context", (), saved)
        towards_x, towards_step, *_ = LearnedStep.backward(context, torch.empty_like(x))
    assert towards_x.device == towards_step.device == CUDA


def test_the_fake_device_tells(tmp_path: Path) -> None:
    """What these tests stand on."""
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException):
            torch.ones((), device=CUDA).item()
        with pytest.raises(RuntimeError, match="device"):
            torch.add(torch.ones(2, device=CUDA), torch.ones(2))
