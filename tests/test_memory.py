"""The memory budget: values beyond it live in files, nothing else changes, and what cannot be kept is refused before the work."""

import dataclasses
import gc
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from tests import zoo
from toolchain import memory, pipeline, survey
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import DeviceMemoryError, StorageError, UsageError
from toolchain.memory import Demand, Room, Work, readable
from toolchain.run_folder import RunFolder
from toolchain.torch_import import TorchBlock

CPU = torch.device("cpu")


def test_values_beyond_the_limit_are_in_files_that_vanish(tmp_path: Path) -> None:
    room = Room(limit=4 * 100, folder=tmp_path)
    first = room.empty((10, 10), torch.float32, CPU)
    assert (room.used, room.filed) == (400, 0)
    second = room.empty((2, 3, 4, 5), torch.float32, CPU)
    assert (room.used, room.filed) == (400, 480)
    assert second.is_contiguous(memory_format=torch.channels_last)
    second.copy_(torch.arange(120.0).reshape(2, 3, 4, 5))
    assert torch.equal(second[1, 2], torch.arange(100.0, 120.0).reshape(4, 5))
    if os.name == "posix":
        assert not list(tmp_path.iterdir())  # unlinked at once: no kill leaves one behind
    del first, second
    gc.collect()
    assert (room.used, room.filed) == (0, 0)
    assert room.empty((10, 10), torch.float32, CPU) is not None
    assert room.empty((0, 3), torch.float32, CPU).shape == (0, 3)


def test_a_disk_without_room_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device"):
        Room(limit=0, folder=tmp_path).empty((4,), torch.float32, CPU)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="no room for"):
        Room(limit=0, folder=tmp_path / "gone").empty((4,), torch.float32, CPU)


@pytest.mark.parametrize("algorithm", ["qdrop", "adaround"])
def test_the_budget_changes_no_code(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    config = Config(device="cpu", iterations=4, batch_size=8, algorithm=algorithm)
    free = pipeline.quantize(source, samples, config)
    filed = []
    original = Room._mapped
    monkeypatch.setattr(Room, "_mapped", lambda self, size, dtype: filed.append(size) or original(self, size, dtype))
    monkeypatch.setattr(Demand, "room_in", lambda *_: 20000.0)  # a few of the values, not all
    bound = pipeline.quantize(source, samples, config)
    assert filed
    for name, grid in free.table.tensors.items():
        again = bound.table[name]
        assert again.scale.tobytes() == grid.scale.tobytes()
        if grid.codes is not None:
            assert again.codes is not None
            assert np.array_equal(grid.codes, again.codes)


def test_the_estimate_follows_liveness() -> None:
    demand = Demand(taken=100, caches=50, work=30, where="b01", joined=40, least=10)
    assert (demand.total, demand.most) == (180, 190)
    assert demand.room_in(None) == math.inf
    assert demand.room_in(150) == 10
    assert demand.room_in(120) == 0  # the work is done in parts
    assert "about 0 MB at the peak" in demand.describe(None)
    assert "go to files" in demand.describe(150)
    with pytest.raises(
        UsageError, match=r"--memory-budget 0 MB.*work on a unit takes about 0 MB in the smallest parts.*give 0.1 GB or more"
    ):
        demand.room_in(109)


def test_caches_grow_with_samples_and_work_with_the_batch(tmp_path: Path) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(64)
    config = Config(device="cpu", batch_size=8)
    found = survey.survey(source, samples, config)

    def demand(count: int, batch: int) -> Demand:
        return survey.expected_memory(source, samples.first(count), found, dataclasses.replace(config, batch_size=batch))

    # The identity block's input and output, 8x8x8 elements each: floats in one stream, codes in the other.
    assert demand(64, 8).caches == 64 * 2 * 8 * 8 * 8 * (4 + 1)
    assert demand(32, 8).caches * 2 == demand(64, 8).caches
    assert demand(64, 64).work > demand(64, 32).work


def test_the_estimate_says_what_joined_blocks_may_take(tmp_path: Path) -> None:
    source, samples, config = zoo.loaded(zoo.resnet((2, 2, 2, 2)), tmp_path), zoo.images(8, (3, 64, 64)), Config(device="cpu", batch_size=8)
    found = survey.survey(source, samples, config)
    pairs, threes = (survey.expected_memory(source, samples, found, dataclasses.replace(config, max_group=most)) for most in (2, 3))
    assert pairs.work < pairs.joined < threes.joined
    assert f"up to {readable(threes.most)} where blocks are joined" in threes.describe(None)
    for alone in ({"units": "none"}, {"algorithm": "adaround"}, {"max_group": 1}):
        demand = survey.expected_memory(source, samples, found, dataclasses.replace(config, **alone))
        assert demand.joined == 0
        assert "joined" not in demand.describe(None)


def test_units_that_do_not_fit_the_budget_are_learned_from_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BRECQ has no dropped elements to draw: the same gradients, up to the order of sums. A run that goes on keeps its parts."""
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    config = Config(device="cpu", iterations=20, batch_size=48, algorithm="brecq")
    monkeypatch.setattr(memory, "resident", lambda: 1 << 20)
    free = pipeline.quantize(source, samples, config)
    expected = survey.expected_memory(source, samples, survey.survey(source, samples, config), config)
    assert expected.least < expected.work
    bound = dataclasses.replace(config, memory_budget=str(expected.taken + (expected.least + expected.work) // 2))
    run = RunFolder.create(tmp_path / "run", {"format": None}, "test")
    found = pipeline.quantize(source, samples, bound, run=run)
    assert any(note.endswith("2 parts of a mini-batch, to stay within --memory-budget") for note in found.notes)
    assert not any("parts" in note for note in free.notes)
    # Where sums in another order round one of the few weights otherwise, a loss moves by some percent.
    assert [r.loss_after for r in found.results] == pytest.approx([r.loss_after for r in free.results], rel=0.1)
    monkeypatch.setattr(memory, "resident", lambda: 0)
    again = pipeline.quantize(source, samples, bound, run=run)
    assert again.notes == found.notes


@pytest.mark.parametrize(("algorithm", "keeps"), [("brecq", True), ("bit-split", False)])
def test_only_what_is_learned_from_mini_batches_is_said_to_be_in_parts(
    algorithm: str, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every unit takes more than this budget leaves; those whose layers stay float learn nothing, and bit-split draws no mini-batches."""
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    layers = [node.name for node in source.graph.weighted]
    monkeypatch.setattr(Demand, "room_in", lambda *_: math.inf)
    config = Config(
        device="cpu",
        iterations=1,
        batch_size=8,
        units="none",
        algorithm=algorithm,
        weight_scheme="symmetric",
        memory_budget="1",
        keep_float=(layers[0],) if keeps else (),
    )
    found = pipeline.quantize(source, samples, config)
    said = {note.partition(":")[0].removeprefix("unit ") for note in found.notes if "parts of a mini-batch" in note}
    assert found.results
    assert said == ({result.unit for result in found.results} if algorithm == "brecq" else set())
    if algorithm == "brecq":
        assert len(found.results) < len(found.plan.units)


def test_whole_passes_are_not_divided(tmp_path: Path) -> None:
    """A model of a fixed batch: the budget has to hold its passes."""
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    samples = zoo.images(64)
    found = survey.survey(source, samples, Config(device="cpu"))
    types, block = found.types, found.rows[1].block
    rows, whole = (Work(source, types, frozenset(), 64, lambda _: 32, 16, is_divisible) for is_divisible in (True, False))
    assert rows.on(block, 2) < rows.on(block) == whole.on(block) == whole.on(block, 2)
    assert (rows.parts_within(block, rows.on(block)), rows.parts_within(block, rows.on(block) - 1)) == (1, 2)
    assert (rows.parts_within(block, 0), whole.parts_within(block, 0)) == (32, 1)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5GiB", 3 * 2**29), ("800 MB", 8 * 10**8), ("1000000", 10**6), ("64kB", 64000)]
)
def test_sizes(text: str, size: int) -> None:
    assert Config(memory_budget=text).memory == size


@pytest.mark.parametrize("text", ["lots", "-1GB", "8 XB", ""])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size such as 8GB"):
        Config(memory_budget=text)


def test_the_command_line_says_what_it_will_take(tmp_path: Path) -> None:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", **zoo.images(16).inputs)  # pyright: ignore[reportArgumentType]
    given = ["quantize", str(tmp_path / "net.onnx"), "--calibration-data", str(tmp_path / "calib.npz"), "--device", "cpu", "--dry-run"]
    shown = CliRunner().invoke(main, given, env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "at the peak" in shown.output
    refused = CliRunner().invoke(main, [*given, "--memory-budget", "10MB"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "--memory-budget 10 MB:" in refused.output
    assert "in the smallest parts, without any cached activation; give" in refused.output


def full(*_: object, **__: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_device_comes_first_then_the_host_then_files(tmp_path: Path) -> None:
    """Meta tensors stand for those of a device: they have a place, but no memory."""
    meta = torch.device("meta")
    room = Room(limit=400, folder=tmp_path, device_limit=800)
    kept = [room.empty((10, 10), torch.float32, meta) for _ in range(4)]
    assert [tensor.device.type for tensor in kept] == ["meta", "meta", "cpu", "cpu"]
    assert (room.on_device, room.used, room.filed) == (800, 400, 400)
    assert not room.notes  # all as planned
    del kept[0]
    gc.collect()
    assert room.empty((10, 10), torch.float32, meta).device == meta


def test_a_device_that_is_full_before_its_time_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    meta, room = torch.device("meta"), Room()
    first = room.empty((10, 10), torch.float32, meta)
    original = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: full() if k.get("device") == meta else original(*a, **k))
    second = room.empty((10, 10), torch.float32, meta)
    monkeypatch.undo()
    third = room.empty((10, 10), torch.float32, meta)  # not tried again
    assert [tensor.device.type for tensor in (first, second, third)] == ["meta", "cpu", "cpu"]
    assert len(room.notes) == 1
    assert "memory was full" in room.notes[0]


def test_a_device_does_the_work_and_the_host_keeps_what_it_cannot() -> None:
    demand = Demand(taken=100, caches=50, work=300, where="b01", device=30)
    assert demand.total == 120
    assert demand.room_in(110) == 10
    assert "on the device 0 MB of them" in demand.describe(None)
    assert "go to files" in demand.describe(110)
    with pytest.raises(UsageError, match="in use already") as refused:
        demand.room_in(90)
    assert "work on block" not in str(refused.value)


def halting(monkeypatch: pytest.MonkeyPatch, most: int, learning: bool) -> None:
    """Forward passes of more than `most` samples run out of memory: those of learning, or those of moving activations."""
    original = TorchBlock.forward

    def forward(self: TorchBlock, values: Any, *observing: Any) -> Any:
        size = max(len(values[name]) for name in self.block.inputs)
        return full() if torch.is_grad_enabled() == learning and size > most else original(self, values, *observing)

    monkeypatch.setattr(TorchBlock, "forward", forward)


@pytest.mark.parametrize("algorithm", ["adaround", "qdrop"])
def test_passes_that_do_not_fit_are_halved_and_change_nothing(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    config = Config(device="cpu", iterations=4, batch_size=8, algorithm=algorithm, units="none")
    free = pipeline.quantize(source, samples, config)
    halting(monkeypatch, most=20, learning=False)
    bound = pipeline.quantize(source, samples, config)
    assert not free.notes
    assert any("did not fit the device's memory with 48 samples in a forward pass" in note for note in bound.notes)
    for name, grid in free.table.tensors.items():
        # Histograms of ranges see other chunks, and convolutions of fewer images add in another order.
        np.testing.assert_allclose(bound.table[name].scale, grid.scale, rtol=1e-3)


def test_mini_batches_that_do_not_fit_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BRECQ has no dropped elements to draw: the same gradients, in three parts of other sizes, up to the order of sums."""
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    config = Config(device="cpu", iterations=20, batch_size=9, algorithm="brecq")
    free = pipeline.quantize(source, samples, config)
    halting(monkeypatch, most=3, learning=True)
    bound = pipeline.quantize(source, samples, config)
    assert [note for note in bound.notes if note.endswith("it was learned from in 4 parts")]
    assert [r.loss_after for r in bound.results] == pytest.approx([r.loss_after for r in free.results], rel=0.02)


def test_a_device_without_room_for_one_sample_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(8)
    halting(monkeypatch, most=0, learning=True)
    with pytest.raises(DeviceMemoryError, match=r"smallest parts either \(CUDA out of memory"):
        pipeline.quantize(source, samples, Config(device="cpu", iterations=2, batch_size=4))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not keep what is freed")
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    """In a process of its own, which it changes for good. Every second of 64 pieces of 4 MB is freed: holes between those that stay."""
    code = """
import numpy
from toolchain.cpu import give_back_freed_memory, keep_freed_memory
from toolchain.memory import resident
keep_freed_memory()
pieces = [numpy.ones(1 << 22, numpy.uint8) for _ in range(64)]
full = resident()
del pieces[::2]
kept = resident()
give_back_freed_memory()
print(full - kept, kept - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    freed, given_back = map(int, done.stdout.split())
    assert freed < 8 << 20  # of the 128 MB, little
    assert given_back > 120 << 20  # all but the pages at the edges
