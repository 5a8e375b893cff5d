"""The run folder: what an interrupted run has finished, so that `--resume` continues it and ends with the same bytes.

Every stage (the calibrated table, then each unit) is one file, written beside and renamed once it is on the disk. A file is either whole or
absent whatever the moment of the interruption, and a checksum tells when a disk says otherwise. The manifest holds what decides the
result (model, data, settings, versions, device kind); a run is continued only where all of it is the same.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .config import Config
from .encodings import copy_of, spec_of
from .errors import StorageError, UsageError
from .memory import SUFFIX
from .option import flag
from .quant_table import TensorQuant
from .samples import Samples
from .source import SourceModel

_FORMAT = 3
_MANIFEST = "run.json"
_PART = ".part"
# Where the work is done leaves the result as it is; so does another budget, since the parts that the first asked for are kept.
_WITHOUT_EFFECT = frozenset({"device", "memory_budget"})


@dataclass(frozen=True)
class Stage:
    """What one stage came to: grids by value name, and JSON-ready facts."""

    tensors: Mapping[str, TensorQuant]
    facts: Mapping[str, Any]


def fingerprint(source: SourceModel, samples: Samples, config: Config, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the codes, as JSON-ready data; `environment` is what `report.environment` returns."""
    return {
        "format": _FORMAT,
        "model": source.sha256,
        "weights": digest(source.constants),  # these may be in files of their own
        "data": digest(samples.inputs),
        **{flag(f.name): _plain(getattr(config, f.name)) for f in fields(config) if f.name not in _WITHOUT_EFFECT},
        **environment["versions"],
        "device": environment["device"].partition(":")[0],
    }


class RunFolder:
    """A folder of finished stages; `damaged` lists the files that had to be left out."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.damaged: list[Path] = []
        self._manifest = manifest

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any], machine: str) -> "RunFolder":
        """Start a run; what is left there of an earlier one is removed.

        Raises:
            UsageError: the folder holds something else than a run.
            StorageError: it cannot be written.
        """
        if path.exists() and not _is_ours(path):
            raise UsageError(f"{path}: is needed for the unfinished run, but is something else; move it, or choose another --output")
        run = cls(path, {"fingerprint": dict(fingerprint), "machine": machine, "units": None, "exporting": False})
        run.remove()
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot be made: {error.strerror}") from error
        run._write_manifest()
        return run

    @classmethod
    def resume(cls, path: Path, fingerprint: Mapping[str, Any]) -> "RunFolder":
        """Continue the run in a folder.

        Raises:
            UsageError: it is a run of something else; the message names every difference.
        """
        manifest = _read_manifest(path)
        old, new = manifest["fingerprint"], json.loads(json.dumps(dict(fingerprint)))
        changes = [_difference(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
        if changes:
            raise UsageError(f"--resume: {path} holds another run: {'; '.join(changes)}. Go back to that, or start anew with --overwrite")
        return cls(path, manifest)

    @property
    def machine(self) -> str:
        """The processor and threads that the run was started on: another one sums floats in another order."""
        return self._manifest["machine"]

    @property
    def exporting(self) -> bool:
        """Whether the output was about to be written: one that exists is this run's own."""
        return self._manifest["exporting"]

    def begin_units(self, total: int) -> None:
        """Note how many units there will be."""
        self._manifest["units"] = total
        self._write_manifest()

    def begin_export(self) -> None:
        """Note that the output is written from here on."""
        self._manifest["exporting"] = True
        self._write_manifest()

    def save(self, name: str, stage: Stage) -> None:
        """Write a stage; it is on the disk when this returns.

        Raises:
            StorageError: the disk is full, or the folder is gone.
        """
        arrays: dict[str, np.ndarray] = {}
        rows = []
        for index, (value, grid) in enumerate(stage.tensors.items()):
            parts = {"scale": grid.scale, "zero_point": grid.zero_point, "codes": grid.codes}
            arrays |= {f"{index}.{part}": np.asarray(array) for part, array in parts.items() if array is not None}
            copy = {"copy_of": grid.copy.origin, "readers": grid.copy.readers} if grid.copy is not None else {}
            rows.append({"name": value, "spec": asdict(grid.spec), "tied_to": grid.tied_to, "fixed": grid.fixed, **copy})
        text = json.dumps({"run": self._identity, "tensors": rows, "facts": dict(stage.facts)})
        arrays["stage"] = np.frombuffer(text.encode(), np.uint8)
        arrays["sha256"] = np.frombuffer(bytes.fromhex(digest(arrays)), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        write_durably(self.path / f"{name}.npz", buffer.getvalue())

    def load(self, name: str) -> Stage | None:
        """A finished stage; None where there is none, or a damaged one (which is then listed in `damaged`)."""
        path = self.path / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            expected = arrays.pop("sha256").tobytes().hex()
            stored = json.loads(arrays["stage"].tobytes())
            if digest(arrays) != expected or stored["run"] != self._identity:
                raise ValueError("the checksum does not match")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self.damaged.append(path)
            return None
        tensors = {}
        for index, row in enumerate(stored["tensors"]):
            scale, zero_point = arrays[f"{index}.scale"][()], arrays[f"{index}.zero_point"][()]
            codes = arrays.get(f"{index}.codes")
            tensors[row["name"]] = TensorQuant(spec_of(row["spec"]), scale, zero_point, codes, row["tied_to"], row["fixed"], copy_of(row))
        return Stage(tensors, stored["facts"])

    def remove(self) -> None:
        """Delete the files of the run, the manifest last, and the folder where nothing else is in it."""
        if not self.path.is_dir():
            return
        for file in [*self.path.glob("*.npz"), *self.path.glob(f"*{SUFFIX}"), *self.path.glob(f"*{_PART}"), self.path / _MANIFEST]:
            file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def _identity(self) -> str:
        return hashlib.sha256(json.dumps(self._manifest["fingerprint"], sort_keys=True).encode()).hexdigest()

    def _write_manifest(self) -> None:
        write_durably(self.path / _MANIFEST, (json.dumps(self._manifest, indent=1) + "\n").encode())


def holds_run(path: Path) -> bool:
    """Whether there is a run to resume."""
    return (path / _MANIFEST).is_file()


def progress_of(path: Path) -> str:
    """How far the run in a folder is: `after unit 5 of 12`."""
    finished, total = len(list(path.glob("unit-*.npz"))), _read_manifest(path)["units"]
    if total is None:
        return "before the first unit"
    return f"after unit {finished} of {total}" if finished else f"before the first of {total} units"


def discard_if_empty(path: Path) -> None:
    """Remove a run that has finished nothing."""
    if holds_run(path) and not any(path.glob("*.npz")):
        RunFolder(path, {}).remove()


def _is_ours(path: Path) -> bool:
    return path.is_dir() and (holds_run(path) or all(file.suffix == _PART for file in path.iterdir()))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, element types, shapes and bytes, in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        state.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
        if array.dtype.hasobject:  # strings
            state.update("\0".join(map(str, array.reshape(-1))).encode())
        else:
            state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a loss of power there is either all of it or what was there before.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(path.name + _PART)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the new name is durable once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written: {error.strerror}. What was finished before is kept: make room, then --resume continues"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"]["format"] != _FORMAT:
            raise ValueError(f"format {manifest['fingerprint']['format']}, this version has {_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path / _MANIFEST} cannot be used ({error}); start anew with --overwrite") from error
    return manifest


def _plain(value: Any) -> Any:
    """JSON has no inf."""
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _difference(key: str, old: Any, new: Any) -> str:
    if key in ("model", "weights", "data"):
        return {"model": "the model file changed", "weights": "the weights changed", "data": "the calibration samples changed"}[key]
    return f"{key} was {old}, is {new}"
