"""Samples from every place they may come from, and a clear refusal of what does not fit."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toolchain.data_config import DataConfig
from toolchain.errors import DataError, UsageError
from toolchain.samples import Preprocessing, Samples, check_labels, load_samples
from toolchain.source import InputSpec

FLOAT = np.dtype(np.float32)
IMAGE = InputSpec("image", FLOAT, ("N", 3, 4, 4))
PAIR = (InputSpec("a", FLOAT, ("N", 2)), InputSpec("b", FLOAT, ("N", 3)))
PLAIN = Preprocessing()


def arrays(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 4, 4)).astype(np.float32)


def load(place: Path | str, *specs: InputSpec, **options: object) -> Samples:
    return load_samples(str(place), specs or (IMAGE,), PLAIN, "--calibration-data", **options)  # pyright: ignore[reportArgumentType]


def test_npz_and_npy(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", image=arrays(), labels=np.arange(5))
    np.save(tmp_path / "s.npy", arrays())
    samples = load(tmp_path / "s.npz")
    assert np.array_equal(samples.inputs["image"], arrays())
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(load(tmp_path / "s.npy").inputs["image"], arrays())


def test_a_past_without_positions_is_no_lack_of_samples(tmp_path: Path) -> None:
    """The first step of a decoder reads keys of no token."""
    np.savez(tmp_path / "s.npz", past=np.zeros((4, 0, 8), np.float32))
    samples = load(tmp_path / "s.npz", InputSpec("past", FLOAT, ("N", "P", 8)))
    assert samples.count == 4


def test_strings_as_objects_are_refused_with_the_remedy(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", words=np.array(["a", "b"], object))
    with pytest.raises(DataError, match=r"save strings as array.astype\('U'\)"):
        load(tmp_path / "s.npz", InputSpec("words", np.dtype(object), ("N",)))


def test_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", a=np.zeros((4, 2), np.float32), b=np.zeros((4, 3), np.float32))
    samples = load(tmp_path / "s.npz", *PAIR)
    assert samples.shapes == {"a": (2,), "b": (3,)}
    np.save(tmp_path / "s.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(DataError, match=r"\.npy file fits a model with one input"):
        load(tmp_path / "s.npy", *PAIR)


def test_chosen_samples_are_seeded_and_keep_their_labels() -> None:
    samples = Samples({"x": np.arange(10, dtype=np.float32).reshape(-1, 1)}, np.arange(10))
    a, b, c = samples.chosen(4, 0), samples.chosen(4, 0), samples.chosen(4, 1)
    assert a.labels is not None
    assert b.labels is not None
    assert c.labels is not None
    assert a.count == 4
    assert a.inputs["x"][:, 0].tolist() == a.labels.tolist() == b.labels.tolist() != c.labels.tolist()
    assert samples.chosen(99, 0).count == 10


FITTING = arrays()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": FITTING}, r"no array for the model input 'image'; there is 'images' \(did you mean 'images'\?\)"),
        ({}, "no array for the model input 'image'; there is nothing"),
        ({"image": FITTING, "extra": FITTING}, "'extra' is no input of the model; its inputs are image: float32['N', 3, 4, 4]"),
        ({"image": FITTING.astype(np.float64)}, "input 'image' expects float32, got float64"),
        ({"image": (FITTING * 10).astype(np.uint8)}, "input 'image' expects float32, got uint8"),
        ({"image": FITTING.transpose(0, 2, 3, 1)}, "input 'image' expects shape [N, 3, 4, 4], got [5, 4, 4, 3]"),
        ({"image": FITTING[0]}, "input 'image' expects shape [N, 3, 4, 4], got [3, 4, 4]"),
        ({"image": FITTING[:0]}, "has no samples"),
        ({"image": np.where(np.arange(5).reshape(-1, 1, 1, 1) == 3, np.float32(np.nan), FITTING)}, "the first in sample 3"),
        ({"image": np.full_like(FITTING, np.inf)}, "NaN or infinite"),
        ({"image": FITTING, "labels": np.zeros(4, np.int64)}, "4 labels for 5 samples"),
        ({"image": FITTING, "labels": np.zeros(5, np.float32)}, "must be integers of shape [N]"),
        ({"image": FITTING, "labels": np.zeros((5, 1), np.int64)}, "must be integers of shape [N]"),
    ],
)
def test_what_does_not_fit_is_refused(content: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **content)  # pyright: ignore[reportArgumentType]
    pattern = message if message.startswith("no array") and "\\" in message else re.escape(message)
    with pytest.raises(DataError, match=pattern):
        load(tmp_path / "s.npz")


def test_broken_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read as"):
        load(tmp_path / "s.npz")
    np.save(tmp_path / "objects.npy", np.array([{"pickled": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as"):
        load(tmp_path / "objects.npy")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "none")


def test_labels_must_be_classes() -> None:
    check_labels(np.array([0, 9]), 10, "here")
    with pytest.raises(DataError, match="labels reach from 0 to 10, but the model has 10 classes"):
        check_labels(np.array([0, 10]), 10, "here")
    with pytest.raises(DataError, match="from -1"):
        check_labels(np.array([-1, 1]), 10, "here")


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png", (255, 0, 0))
    picture(tmp_path / "ant" / "2.png", (0, 255, 0))
    picture(tmp_path / "ant" / "3.png", (0, 0, 255))
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    samples = load(tmp_path)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]  # classes in sorted order
    assert samples.inputs["image"].shape == (3, 3, 4, 4)
    assert samples.inputs["image"][2, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_labels_from_a_csv(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, (9, 9, 9))
    (tmp_path / "labels.csv").write_text("file,label\nb.png,7\na.png,3\n")
    samples = load(tmp_path)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 3]
    other = tmp_path / "other.csv"
    other.write_text("a.png,1\n")
    again = load(tmp_path, labels=other)
    assert again.labels is not None
    assert again.labels.tolist() == [1]
    other.write_text("c.png,1\n")
    with pytest.raises(DataError, match=r"names c\.png, which is not in"):
        load(tmp_path, labels=other)
    other.write_text("a.png,1\nb.png,one\n")
    with pytest.raises(DataError, match="expected lines of `file name,class number`"):
        load(tmp_path, labels=other)
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path, labels=tmp_path / "none.csv")


def test_image_preprocessing(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (255, 128, 0), (16, 8))
    nhwc = InputSpec("image", FLOAT, ("N", 4, 4, 3))
    tf = Preprocessing(mean=(0.5,), std=(0.5,))
    pixels = load_samples(str(tmp_path), [nhwc], tf, "--eval-data").inputs["image"]
    assert pixels.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(pixels[0, 0, 0], [1.0, 128 / 127.5 - 1, -1.0], atol=1e-6)
    bgr = load_samples(str(tmp_path), [nhwc], Preprocessing(bgr=True, std=(1 / 255,)), "--eval-data").inputs["image"]
    np.testing.assert_allclose(bgr[0, 0, 0], [0.0, 128.0, 255.0], atol=1e-4)
    gray = InputSpec("image", FLOAT, ("N", 1, 4, 4))
    assert load_samples(str(tmp_path), [gray], PLAIN, "--eval-data").inputs["image"].shape == (1, 1, 4, 4)
    half = InputSpec("image", np.dtype(np.float16), ("N", 3, 4, 4))
    assert load_samples(str(tmp_path), [half], PLAIN, "--eval-data").inputs["image"].dtype == np.float16


def test_centre_crop_keeps_the_middle(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (10, 0, 30, 20))  # the middle square is white
    image.save(tmp_path / "a.png")
    spec = InputSpec("image", FLOAT, ("N", 3, 10, 10))
    cropped = load_samples(str(tmp_path), [spec], Preprocessing(crop=0.8), "--eval-data").inputs["image"]
    squeezed = load_samples(str(tmp_path), [spec], PLAIN, "--eval-data").inputs["image"]
    assert cropped.min() == 1.0
    assert squeezed.min() == 0.0


def test_image_folders_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a\.png: is not a readable image"):
        load(tmp_path)
    picture(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(DataError, match="leaves its image size open"):
        load(tmp_path, InputSpec("image", FLOAT, ("N", 3, None, None)))
    with pytest.raises(DataError, match="cannot tell the channel axis"):
        load(tmp_path, InputSpec("image", FLOAT, ("N", 8, 8, 8)))
    with pytest.raises(DataError, match="one image input"):
        load(tmp_path, *PAIR)


def test_a_limit_spreads_over_the_classes(tmp_path: Path) -> None:
    for label in range(3):
        for index in range(4):
            picture(tmp_path / str(label) / f"{index}.png", (label, 0, 0))
    labels = load(tmp_path, limit=3).labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "feeding.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for i in range(100):\n"
        "        yield {'image': np.full((2, 3, 4, 4), i, np.float32)}, np.array([i, i])\n"
        "def plain():\n"
        "    return [np.zeros((3, 3, 4, 4), np.float32)]\n"
        "def broken():\n"
        "    raise RuntimeError('disk on fire')\n"
        "def empty():\n"
        "    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    samples = load("feeding:batches", limit=5)
    assert samples.count == 5
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1, 1, 2]
    assert load("feeding:plain").count == 3
    for name, message in (("broken", "RuntimeError: disk on fire"), ("empty", "no batches"), ("absent", "AttributeError")):
        with pytest.raises(DataError, match=message):
            load(f"feeding:{name}")
    with pytest.raises(DataError, match="ModuleNotFoundError"):
        load("nowhere:batches")


def test_preprocessing_of_a_configuration() -> None:
    found = Preprocessing.of(DataConfig(image_preset="imagenet", image_crop="none", image_mean="0.1,0.2,0.3", image_size="10x20"))
    assert found == Preprocessing((10, 20), None, "bilinear", (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    assert Preprocessing.of(DataConfig(image_preset="imagenet")).crop == 0.875
    mistakes: list[dict[str, Any]] = [{"image_size": "big"}, {"image_crop": "2"}, {"image_mean": "a,b"}, {"image_std": "0"}]
    for options in mistakes:
        with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')}"):
            DataConfig(**options)
