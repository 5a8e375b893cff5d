"""Calibration and evaluation samples: read from npz, npy, image folders or Python, and checked against the model before any work."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .data_config import DataConfig
from .errors import DataError, near_misses
from .source import InputSpec
from .user_code import function_at, users_code

LABELS = "labels"
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
FILTERS: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the model's input: (pixel / 255 - mean) / std for each channel.

    `crop` is the share of the shorter side that the central square keeps (0.875: resize to size / 0.875, then crop), None squeezes the
    whole image to the input size. `size` is (height, width), None takes the model's.
    """

    size: tuple[int, int] | None = None
    crop: float | None = None
    resize_filter: str = "bilinear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    bgr: bool = False
    layout: str | None = None

    @classmethod
    def of(cls, data: DataConfig) -> "Preprocessing":
        """A preset with what the configuration overrides."""
        preset = PRESETS[data.image_preset]
        return cls(
            size=data.size,
            crop=preset.crop if data.image_crop is None else data.crop,
            resize_filter=data.image_filter,
            mean=data.mean or preset.mean,
            std=data.std or preset.std,
            bgr=data.image_channels == "bgr",
            layout=data.image_layout,
        )


PRESETS: Mapping[str, Preprocessing] = {
    "imagenet": Preprocessing(crop=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "tf": Preprocessing(crop=0.875, mean=(0.5,), std=(0.5,)),
    "raw01": Preprocessing(),
    "raw255": Preprocessing(std=(1 / 255,)),
}


@dataclass(frozen=True)
class Samples:
    """Arrays [N, one sample's shape] by input name, and the labels where there are any: class numbers [N], or [N, ...] for a metric.

    Samples come first here whatever axis of the model's input counts them; `runtime.batched` gives them the model's layout. `note` says
    what a reader of results has to know of them, if anything.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    note: str | None = None

    @property
    def count(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample of each input."""
        return {name: tuple(array.shape[1:]) for name, array in self.inputs.items()}

    def first(self, count: int) -> "Samples":
        return self.taken(np.arange(min(count, self.count)))

    def chosen(self, count: int, seed: int) -> "Samples":
        """At most `count` samples, drawn without replacement (data files are often sorted by class)."""
        return self.taken(np.random.default_rng(seed).permutation(self.count)[:count])

    def whole(self, batch: int | None) -> "Samples":
        """As many samples as fill batches of a fixed size; one batch, filled up by repetition, where there are fewer."""
        return self if batch is None else self.taken(np.arange(max(self.count // batch, 1) * batch) % self.count)

    def taken(self, rows: np.ndarray) -> "Samples":
        labels = None if self.labels is None else self.labels[rows]
        return Samples({name: array[rows] for name, array in self.inputs.items()}, labels, self.note)


def load_samples(
    place: str,
    specs: Sequence[InputSpec],
    preprocessing: Preprocessing,
    option: str,
    labels: Path | None = None,
    limit: int | None = None,
    any_labels: bool = False,
) -> Samples:
    """Read samples and check them against the model's inputs.

    Args:
        place: a .npz file (arrays by input name, and `labels`), a .npy file (one input), an image folder (class sub-folders, or a
            labels.csv of file name and class number), or `module:function` returning an iterable of batches.
        specs: the model's inputs.
        preprocessing: for image folders.
        option: the flag that named the place, for messages.
        labels: a labels csv outside the image folder.
        limit: most samples to read of an image folder or a function.
        any_labels: labels are for a metric, which knows what they are, and no class numbers.

    Raises:
        DataError: the place cannot be read, or what is there does not fit the model.
    """
    path = Path(place)
    if path.is_dir():
        samples = _from_folder(path, specs, preprocessing, option, labels, limit)
    elif path.suffix in (".npz", ".npy") or path.is_file():
        samples = _from_file(path, specs, option)
    elif ":" in place:
        samples = _from_function(place, specs, option, limit)
    else:
        raise DataError(f"{option} {place}: no such file or folder (expected .npz, .npy, an image folder, or module:function)")
    return check_samples(samples, specs, f"{option} {place}", any_labels)


def check_samples(samples: Samples, specs: Sequence[InputSpec], where: str, any_labels: bool = False) -> Samples:
    """Compare names, dtypes, shapes, counts and values with what the model takes, and bring the sample axis to the front.

    An input without a sample axis (a sampling rate) may be given once, in its own shape, for all samples. Labels are class numbers, or
    with `any_labels` whatever has a row for each sample.

    Raises:
        DataError: saying what was expected and what came.
    """
    names = [spec.name for spec in specs]
    for spec in specs:
        if spec.name not in samples.inputs:
            came = ", ".join(repr(name) for name in samples.inputs)
            guess = near_misses(spec.name, samples.inputs)
            raise DataError(f"{where}: no array for the model input {spec.name!r}; there is {came or 'nothing'}{guess}")
    for name in samples.inputs:
        if name not in names:
            raise DataError(f"{where}: {name!r} is no input of the model; its inputs are {', '.join(map(str, specs))}")
    for spec in specs:
        _check_array(samples.inputs[spec.name], spec, where)
    arrays = {spec.name: samples.inputs[spec.name] for spec in specs}
    counts = {spec.name: arrays[spec.name].shape[spec.axis or 0] for spec in specs if not _is_shared(arrays[spec.name], spec)}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the inputs have different numbers of samples: {counts}")
    count = next(iter(counts.values()), 1)
    if samples.labels is not None:
        got = f"{samples.labels.dtype}{_dims(samples.labels.shape)}"
        if not any_labels and (samples.labels.ndim != 1 or samples.labels.dtype.kind not in "iu"):
            raise DataError(f"{where}: {LABELS!r} must be integers of shape [N], got {got}; labels of another kind are for --metric")
        if not samples.labels.ndim:
            raise DataError(f"{where}: {LABELS!r} must have a row for each sample, got {got}")
        if len(samples.labels) != count:
            raise DataError(f"{where}: {len(samples.labels)} labels for {count} samples")
    return Samples({spec.name: _samples_first(arrays[spec.name], spec, count) for spec in specs}, samples.labels)


def _check_array(array: np.ndarray, spec: InputSpec, where: str) -> None:
    if array.dtype != spec.dtype and not (spec.dtype.kind == "O" and array.dtype.kind == "U"):
        raise DataError(f"{where}: input {spec.name!r} expects {spec.dtype}, got {array.dtype}; convert it with .astype(np.{spec.dtype})")
    wanted: list[object] = [d if d is not None else "?" for d in spec.shape]
    if spec.axis is not None:
        wanted[spec.axis] = "N"
    own = array.shape if array.ndim == len(spec.shape) or spec.axis is not None else array.shape[1:]
    fits = len(own) == len(wanted) and all(not isinstance(want, int) or want == got for want, got in zip(wanted, own, strict=True))
    if not fits:
        several = f" for all samples, or {_dims(['N', *wanted])}" if spec.axis is None else ""
        raise DataError(f"{where}: input {spec.name!r} expects shape {_dims(wanted)}{several}, got {_dims(array.shape)}")
    count = array.shape[spec.axis or 0] if array.ndim else 1
    if count == 0:
        raise DataError(f"{where}: input {spec.name!r} has no samples (shape {_dims(array.shape)})")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0]
        sample = int(first[spec.axis or 0]) if array.ndim else 0
        raise DataError(f"{where}: input {spec.name!r} has NaN or infinite values, the first in sample {sample}")


def _is_shared(array: np.ndarray, spec: InputSpec) -> bool:
    """Whether an input without a sample axis was given once for all samples."""
    return spec.axis is None and array.ndim == len(spec.shape)


def _samples_first(array: np.ndarray, spec: InputSpec, count: int) -> np.ndarray:
    array = array.astype(object) if array.dtype.kind == "U" else array
    if _is_shared(array, spec):
        return np.broadcast_to(array, (count, *array.shape))
    return np.moveaxis(array, spec.axis, 0) if spec.axis else array


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Labels must be class numbers of the model's output."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels reach from {low} to {high}, but the model has {classes} classes (0 to {classes - 1})")


def _from_file(path: Path, specs: Sequence[InputSpec], option: str) -> Samples:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except FileNotFoundError:
        raise DataError(f"{option} {path}: no such file") from None
    except Exception as error:  # zip, pickle, header and OS errors alike: the file is not what NumPy wrote
        advice = "; save strings as array.astype('U')" if "allow_pickle" in str(error) else ""
        raise DataError(f"{option} {path}: cannot be read as .npz or .npy: {error}{advice}") from error
    if isinstance(arrays, dict):
        labels = arrays.pop(LABELS, None)
        return Samples(arrays, labels)
    if len(specs) != 1:
        raise DataError(f"{option} {path}: a .npy file fits a model with one input; this one has {', '.join(map(str, specs))}: use .npz")
    return Samples({specs[0].name: arrays})


def _from_function(place: str, specs: Sequence[InputSpec], option: str, limit: int | None) -> Samples:
    """Batches are arrays (one input) or dictionaries by input name, which may hold `labels`; or pairs (either of these, labels)."""
    function = function_at(place, option)
    with users_code(f"{option} {place}"):
        batches: Iterable[Any] = function()
        inputs: dict[str, list[np.ndarray]] = {}
        labels: list[np.ndarray] = []
        count = 0
        for item in batches:
            batch, truth = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            arrays = dict(batch) if isinstance(batch, Mapping) else {specs[0].name: batch}
            truth = arrays.pop(LABELS, truth)
            for name, array in arrays.items():
                inputs.setdefault(name, []).append(np.asarray(array))
            if truth is not None:
                labels.append(np.asarray(truth))
            count += len(next(iter(arrays.values())))
            if limit is not None and count >= limit:
                break
        joined = {name: np.concatenate(parts) for name, parts in inputs.items()}
    if not joined:
        raise DataError(f"{option} {place}: the function returned no batches")
    samples = Samples(joined, np.concatenate(labels) if labels else None)
    return samples if limit is None else samples.first(limit)


def _from_folder(
    folder: Path, specs: Sequence[InputSpec], preprocessing: Preprocessing, option: str, labels: Path | None, limit: int | None
) -> Samples:
    if len(specs) != 1 or len(specs[0].shape) != 4:
        raise DataError(f"{option} {folder}: an image folder fits a model with one image input; this one has {', '.join(map(str, specs))}")
    files, truth = _listed(folder, option, labels)
    if limit is not None and len(files) > limit:
        rows = np.linspace(0, len(files) - 1, limit).round().astype(int)  # spread over the classes, which files are sorted by
        files, truth = [files[i] for i in rows], None if truth is None else truth[rows]
    size, layout, channels = _image_shape(specs[0], preprocessing, f"{option} {folder}")
    images = np.stack([_image(file, size, channels, preprocessing, option) for file in files])
    images = images if layout == "nhwc" else images.transpose(0, 3, 1, 2)
    kind = specs[0].dtype if specs[0].dtype.kind == "f" else np.dtype(np.float32)  # half precision where the model takes that
    return Samples({specs[0].name: np.ascontiguousarray(images, kind)}, truth)


def _listed(folder: Path, option: str, labels: Path | None) -> tuple[list[Path], np.ndarray | None]:
    """Image files with their class numbers: from a csv, from class sub-folders (numbered in sorted order), or without any."""
    table = labels if labels is not None else folder / "labels.csv"
    if table.is_file():
        try:
            rows = [row for row in csv.reader(table.read_text(encoding="utf-8").splitlines()) if row]
            rows = rows[1:] if rows and not rows[0][-1].strip().lstrip("-").isdigit() else rows  # a header line
            files, truth = [folder / row[0] for row in rows], np.array([int(row[1]) for row in rows], np.int64)
        except (OSError, UnicodeDecodeError, IndexError, ValueError) as error:
            raise DataError(f"{option}: {table}: expected lines of `file name,class number`: {error}") from error
    elif labels is not None:
        raise DataError(f"--labels {labels}: no such file")
    else:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        nested = [(file, number) for number, entry in enumerate(classes) for file in sorted(entry.iterdir()) if _is_image(file)]
        files = [file for file, _ in nested] or sorted(file for file in folder.iterdir() if _is_image(file))
        truth = np.array([number for _, number in nested], np.int64) if nested else None
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{option}: {table} names {missing.name}, which is not in {folder}")
    if not files:
        raise DataError(f"{option} {folder}: no images ({', '.join(sorted(_IMAGE_SUFFIXES))}) in it or in its sub-folders")
    return files, truth


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file()


def _image_shape(spec: InputSpec, preprocessing: Preprocessing, where: str) -> tuple[tuple[int, int], str, int]:
    """(height, width), layout and channels that the model's input wants."""
    _, a, b, c = spec.shape
    layout = preprocessing.layout or ("nchw" if a in (1, 3) else "nhwc" if c in (1, 3) else None)
    if layout is None:
        raise DataError(f"{where}: cannot tell the channel axis of {spec}; give --image-layout nchw or nhwc")
    channels, height, width = (a, b, c) if layout == "nchw" else (c, a, b)
    if preprocessing.size is not None:
        height, width = preprocessing.size
    if not isinstance(height, int) or not isinstance(width, int) or not isinstance(channels, int):
        raise DataError(f"{where}: the model leaves its image size open ({spec}); give --image-size HEIGHTxWIDTH")
    return (height, width), layout, channels


def _image(file: Path, size: tuple[int, int], channels: int, preprocessing: Preprocessing, option: str) -> np.ndarray:
    """One image as float32 [H, W, C]."""
    height, width = size
    how = FILTERS[preprocessing.resize_filter]
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{option}: {file}: is not a readable image: {error}") from error
    if preprocessing.crop is None:
        image = image.resize((width, height), how)
    else:
        scale = max(height / image.height, width / image.width) / preprocessing.crop
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), how)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, channels)
    if preprocessing.bgr:
        pixels = pixels[..., ::-1]
    return (pixels / 255 - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)


def _dims(shape: Iterable[object]) -> str:
    return f"[{', '.join(map(str, shape))}]"
