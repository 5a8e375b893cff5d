"""Interruptions: whatever the moment, `--resume` ends with the bytes of an uninterrupted run, or refuses and says why."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from toolchain import pipeline, run_folder, units
from toolchain.cli import main
from toolchain.errors import StorageError, UsageError
from toolchain.quant_table import TensorQuant, activation_spec, weight_spec
from toolchain.run_folder import RunFolder, Stage

ITERATIONS = 4
SEED = os.environ.get("MRECG_KILL_SEED", "0")  # for trying other moments than the usual


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", **zoo.images(16).inputs)  # pyright: ignore[reportArgumentType]
    return tmp_path


def arguments(place: Path, *extra: object) -> list[str]:
    given = ["quantize", place / "net.onnx", "--calibration-data", place / "calib.npz", "--device", "cpu", "--iterations", ITERATIONS]
    return [str(a) for a in (*given, "--batch-size", 8, *extra)]


def run(place: Path, *extra: object) -> Result:
    result = CliRunner().invoke(main, arguments(place, *extra), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model that an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    onnx.save(zoo.tiny_resnet(), folder / "net.onnx")
    np.savez(folder / "calib.npz", **zoo.images(16).inputs)  # pyright: ignore[reportArgumentType]
    assert run(folder).exit_code == 0
    assert not (folder / "net.w4a4.run").exists()
    return (folder / "net.w4a4.onnx").read_bytes()


def interrupt_in_unit(monkeypatch: pytest.MonkeyPatch, number: int, how: BaseException | int = 0) -> None:
    """Let the unit of that number (from 0) be interrupted instead of learned: by an exception, or by a signal to this process."""
    original, seen = units.reconstruct_unit, []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script starts with Ctrl-C ignored

    def interrupted(unit: Any) -> Any:
        seen.append(1)
        if len(seen) == number + 1:
            if isinstance(how, BaseException):
                raise how
            os.kill(os.getpid(), how or signal.SIGINT)
        return original(unit)

    monkeypatch.setattr(units, "reconstruct_unit", interrupted)


@pytest.mark.parametrize(("how", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_signals_keep_what_is_finished(
    how: int, code: int, word: str, place: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_in_unit(patch, 2, how)
        result = run(place)
    assert result.exit_code == code
    assert f"{word} after unit 2 of 4; --resume continues" in result.output
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (place / "net.w4a4.onnx").exists()
    refused = run(place)
    assert refused.exit_code == 2
    assert "holds an unfinished run (after unit 2 of 4); --resume continues it, --overwrite starts anew" in refused.output
    learned: list[str] = []
    original = units.reconstruct_unit
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "calibrate", lambda *_: pytest.fail("the calibrated table is in the run folder"))
        patch.setattr(units, "reconstruct_unit", lambda unit: learned.append(unit.piece.block.name) or original(unit))
        resumed = run(place, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after unit 2 of 4" in resumed.output
    assert learned == ["b02", "b03"]
    assert (place / "net.w4a4.onnx").read_bytes() == expected
    assert not (place / "net.w4a4.run").exists()
    report = json.loads((place / "net.w4a4.report" / "report.json").read_text())
    assert [unit["unit"] for unit in report["units"]] == ["b00", "b01", "b02", "b03"]
    assert all(unit["seconds"] > 0 and len(unit["curve"]["loss"]) == ITERATIONS for unit in report["units"])


def test_a_run_is_kept_and_continued_at_its_end(place: Path, expected: bytes) -> None:
    """An output that the run itself wrote is no obstacle, one that was there before is."""
    assert run(place, "--keep-run").exit_code == 0
    (place / "net.w4a4.onnx").unlink()
    assert run(place, "--resume", "--keep-run").exit_code == 0
    assert (place / "net.w4a4.onnx").read_bytes() == expected
    assert run(place, "--resume").exit_code == 0  # overwrites its own
    result = run(place, "--resume")
    assert result.exit_code == 2
    assert "exists; give --overwrite" in result.output


def test_an_output_from_elsewhere_is_not_overwritten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_unit(patch, 1)
        run(place)
    (place / "net.w4a4.onnx").write_bytes(b"precious")
    assert "exists; give --overwrite" in run(place, "--resume").output
    assert (place / "net.w4a4.onnx").read_bytes() == b"precious"
    assert run(place, "--resume", "--overwrite").exit_code == 0


def test_overwrite_starts_anew_and_resume_without_a_run_starts(place: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_unit(patch, 1)
        run(place, "--seed", 1)
    result = run(place, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (place / "net.w4a4.onnx").read_bytes() == expected
    (place / "net.w4a4.onnx").unlink()
    result = run(place, "--resume")
    assert "no unfinished run in" in result.output
    assert (place / "net.w4a4.onnx").read_bytes() == expected


def test_a_full_disk_stops_with_what_is_finished(place: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write fails (of a file's content or of its name), nothing half-written stays and the next attempt gets further."""
    synchronise, failures = os.fsync, 0
    for failing in itertools.cycle((1, 2, 3, 4, 5)):
        with monkeypatch.context() as patch:
            calls = itertools.count(1)

            def full(descriptor: int, calls: Any = calls, failing: int = failing) -> None:
                if next(calls) == failing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                synchronise(descriptor)

            patch.setattr(run_folder.os, "fsync", full)
            result = run(place, "--resume")
        assert not list(place.glob("**/*.part"))
        if result.exit_code == 0:
            break
        failures += 1
        assert result.exit_code == 8, result.output
        assert "No space left on device" in result.output
        assert not (place / "net.w4a4.onnx").exists()
    assert failures >= 5
    assert (place / "net.w4a4.onnx").read_bytes() == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other run"])
def test_damaged_stages_are_done_again(damage: str, place: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_unit(patch, 3)
        run(place)
    path = place / "net.w4a4.run" / "unit-001.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        middle = len(content) // 2  # a single byte there may be one that the archive has no use for
        content[middle : middle + 64] = bytes(byte ^ 1 for byte in content[middle : middle + 64])
    elif damage == "cut":
        del content[-40:]
    elif damage == "empty":
        content.clear()
    else:
        run_with_other_seed = place / "other"
        run_with_other_seed.mkdir()
        other = RunFolder.create(run_with_other_seed / "x.run", {"format": run_folder._FORMAT, "seed": 7}, "here")
        other.save("unit-001", Stage({}, {}))
        content = bytearray((other.path / "unit-001.npz").read_bytes())
    path.write_bytes(content)
    result = run(place, "--resume")
    assert result.exit_code == 0, result.output
    assert "unit-001.npz was damaged; that stage was done again" in result.output
    assert (place / "net.w4a4.onnx").read_bytes() == expected


def test_what_decides_the_result_must_be_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_unit(patch, 2)
        run(place)

    def refused(*extra: object) -> str:
        result = run(place, "--resume", *extra)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    text = refused("--seed", 3, "--weight-lr", 0.1, "-o", place / "net.w4a4.onnx")
    assert "--seed was 0, is 3; --weight-lr was None, is 0.1" in text
    assert "start anew with --overwrite" in text
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "9")
        patch.setattr("toolchain.report.metadata.version", lambda package: "0.0.0")
        assert "torch was" in refused()
    kept = {name: (place / name).read_bytes() for name in ("net.onnx", "calib.npz")}
    np.savez(place / "calib.npz", **zoo.images(16, seed=9).inputs)  # pyright: ignore[reportArgumentType]
    assert "the calibration samples changed" in refused()
    onnx.save(zoo.tiny_resnet(seed=5), place / "net.onnx")
    assert "the model file changed; the weights changed; the calibration samples changed" in refused()
    for name, content in kept.items():
        (place / name).write_bytes(content)
    (place / "net.w4a4.run" / "run.json").write_text("{")
    assert "run.json cannot be used" in refused()


def test_a_folder_of_something_else_is_left_alone(place: Path) -> None:
    (place / "net.w4a4.run").mkdir()
    (place / "net.w4a4.run" / "photo.jpg").write_bytes(b"precious")
    result = run(place)
    assert result.exit_code == 2
    assert "is something else" in result.output
    assert (place / "net.w4a4.run" / "photo.jpg").read_bytes() == b"precious"


def test_stages_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "x.run", {"format": run_folder._FORMAT}, "here")
    spec = weight_spec(4, 0, symmetric=True)
    codes = np.arange(-8, 7, dtype=np.int32).reshape(3, 5)
    weight = TensorQuant(spec, np.array([1e-3, np.pi, 7], np.float32), np.zeros(3, np.int32), codes)
    scalar = TensorQuant(activation_spec(8, symmetric=False), np.float32(1 / 3), np.int32(7))
    tensors = {
        "w/é": weight,
        "a": scalar,
        "b": replace(scalar, tied_to="a"),
        "c": replace(scalar, spec=replace(scalar.spec, span=(0.0, 1.0)), fixed=True),
    }
    facts = {"loss": 0.1 + 0.2, "nan": float("nan"), "curve": [[0, 1e-300]]}
    run.save("unit-000", Stage(tensors, facts))
    found = RunFolder.resume(run.path, {"format": run_folder._FORMAT}).load("unit-000")
    assert found is not None
    assert list(found.tensors) == list(tensors)
    assert str(dict(found.facts)) == str(facts)
    for name, grid in tensors.items():
        again = found.tensors[name]
        assert (again.spec, again.tied_to, again.fixed) == (grid.spec, grid.tied_to, grid.fixed)
        assert type(again.scale) is type(grid.scale)
        assert type(again.zero_point) is type(grid.zero_point)
        assert again.scale.tobytes() == grid.scale.tobytes()
        assert (again.codes is None) == (grid.codes is None)
    restored = found.tensors["w/é"].codes
    assert restored is not None
    assert restored.dtype == np.int8  # bytes hold up to 8 bits
    assert np.array_equal(restored, codes)
    with pytest.raises(UsageError, match="seed was None, is 1"):
        RunFolder.resume(run.path, {"format": run_folder._FORMAT, "seed": 1})
    run.remove()
    assert not run.path.exists()
    with pytest.raises(StorageError, match="make room"):
        run.save("unit-001", Stage(tensors, facts))


def test_digest_sees_names_types_shapes_and_bytes() -> None:
    base = np.arange(6, dtype=np.int32)
    others = [{"y": base}, {"x": base.astype(np.uint32)}, {"x": base.reshape(2, 3)}, {"x": base[::-1]}, {"x": base, "y": base}]
    found = {run_folder.digest(arrays) for arrays in [{"x": base}, *others]}
    assert len(found) == 6
    assert run_folder.digest({"x": base.reshape(2, 3).T}) == run_folder.digest({"x": np.ascontiguousarray(base.reshape(2, 3).T)})
    assert asdict(activation_spec(8, symmetric=True))  # what a stage stores of a grid


_KILLER = """
import glob, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from toolchain.cli import main
import exporters, toolchain.pipeline, toolchain.validation  # loaded before the fork

coin, folder, arguments = random.Random(int(sys.argv[1])), sys.argv[2], sys.argv[3:]
stages, code = 0, None
while code not in (0, 2):  # 2: the output exists, killed when all was done
    child = os.fork()
    if child == 0:
        try:
            main(arguments + ["--resume"])
        except SystemExit as end:
            os._exit(end.code or 0)  # without the exit handlers of the parent's threads, which a fork does not have
    ended = 0
    while not ended and len(glob.glob(folder + "/*.npz")) < stages:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if stages < 6:
            time.sleep(coin.uniform(0.0, 0.15))
            os.kill(child, coin.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(stages, code, os.path.exists(folder))
    stages += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_points_the_bytes_are_the_same(place: Path, expected: bytes) -> None:
    """SIGKILL leaves no time to tidy up: what is on the disk at any moment must do. One kill a stage, at a random moment of the next."""
    command = [sys.executable, "-c", _KILLER, SEED, str(place / "net.w4a4.run"), *arguments(place)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 6, done.stdout  # five kills at least
    assert (place / "net.w4a4.onnx").read_bytes() == expected
    assert sorted(p.name for p in place.iterdir()) == ["calib.npz", "net.onnx", "net.w4a4.onnx", "net.w4a4.report"]
