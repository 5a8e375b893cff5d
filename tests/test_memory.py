"""The memory budget: values beyond it live in files, nothing else changes, and what cannot be kept is refused before the work."""

import dataclasses
import gc
import math
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from tests import zoo
from toolchain import memory, pipeline, survey
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import StorageError, UsageError
from toolchain.memory import Demand, Room

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
    demand = Demand(taken=100, caches=50, work=30, where="b01")
    assert demand.total == 180
    assert demand.room_in(None) == math.inf
    assert demand.room_in(150) == 20
    assert "about 0 MB at the peak" in demand.describe(None)
    assert "go to files" in demand.describe(150)
    with pytest.raises(UsageError, match=r"--memory-budget 0 MB.*work on block b01.*lower --batch-size"):
        demand.room_in(120)


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
    assert "or lower --batch-size" in refused.output
