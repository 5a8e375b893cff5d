"""Write calibration and evaluation npz files of the benchmark models.

usage: python -m tests.benchmarks.prepare SHARED_DATA OUT_FOLDER

SHARED_DATA holds `cifar10/` and `imagenet/` (uint8 arrays and labelled image folders). What is absent is skipped with its reason. Writes
MODEL_calibration.npz and MODEL_evaluation.npz for `resnet20` (CIFAR-10, ImageNet mean and std), `sample` (the project's MobileNetV2 x0.5)
and `mobilenetv2` (1000 calibration and 500 evaluation images, squeezed to 224 pixels).
"""

import argparse
from pathlib import Path

import numpy as np

from toolchain.data_config import DataConfig
from toolchain.samples import Preprocessing, load_samples
from toolchain.source import InputSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar10(folder: Path, out: Path, model: str, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Normalise the uint8 images [N, 32, 32, 3] to float32 [N, 3, 32, 32]."""
    for source, kind in (("calib1024_train_u8.npz", "calibration"), ("test_5000_u8.npz", "evaluation")):
        if not (folder / source).is_file():
            print(f"{model} {kind}: skipped, {folder / source} is not there")
            continue
        data = np.load(folder / source)
        images = (data["x"].astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
        arrays = {name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
        if kind == "evaluation":
            arrays["labels"] = data["y"].astype(np.int64)
        np.savez(out / f"{model}_{kind}.npz", **arrays)  # pyright: ignore[reportArgumentType]


def imagenet(folder: Path, out: Path, model: str, spec: InputSpec) -> None:
    """Decode labelled image folders with the torchvision normalisation."""
    preprocessing = Preprocessing.of(DataConfig(image_preset="imagenet", image_crop="none"))
    for source, kind in (("sample1000", "calibration"), ("nips17", "evaluation")):
        if not (folder / source).is_dir():
            print(f"{model} {kind}: skipped, {folder / source} is not there")
            continue
        samples = load_samples(str(folder / source), [spec], preprocessing, "--data")
        arrays = dict(samples.inputs)
        if kind == "evaluation" and samples.labels is not None:
            arrays["labels"] = samples.labels
        np.savez(out / f"{model}_{kind}.npz", **arrays)  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Read the command line and prepare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cifar10(args.data / "cifar10", args.out, "resnet20", "input", *IMAGENET)
    cifar10(args.data / "cifar10", args.out, "sample", "image", *CIFAR)
    imagenet(args.data / "imagenet", args.out, "mobilenetv2", InputSpec("input", np.dtype(np.float32), ("N", 3, 224, 224)))


if __name__ == "__main__":
    main()
