"""A U-Net of random weights for large images, and images for it: what memory and time such models take.

    python -m tests.benchmarks.unet FOLDER [--size 512] [--width 16] [--samples 24]

writes FOLDER/unet_SIZE.onnx and FOLDER/unet_SIZE.npz, for `mrecg-onnx quantize`.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx

from tests.zoo import Builder

_DEPTH = 4


def unet(size: int, width: int) -> onnx.ModelProto:
    """Ronneberger et al. (2015), with padded convolutions: [1, 3, size, size] to a map of one class."""
    b = Builder({"x": [1, 3, size, size]})
    x, channels, skips = "x", 3, list[str]()
    for level in range(_DEPTH + 1):
        if level:
            x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        for _ in range(2):
            x, channels = b.conv(x, channels, width << level, act="relu"), width << level
        skips.append(x)
    for level in reversed(range(_DEPTH)):
        weight = b.weight(f"up{level}_w", (channels, width << level, 2, 2), channels)
        x = b.op("Concat", b.op("ConvTranspose", x, weight, strides=[2, 2]), skips[level], axis=1)
        channels = 2 * (width << level)
        for _ in range(2):
            x, channels = b.conv(x, channels, width << level, act="relu"), width << level
    return b.model(b.op("Sigmoid", b.conv(x, channels, 1, kernel=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--samples", type=int, default=24)
    args = parser.parse_args()
    onnx.save(unet(args.size, args.width), args.folder / f"unet_{args.size}.onnx")
    steps = np.random.default_rng(0).standard_normal((args.samples, 3, args.size, args.size), dtype=np.float32)
    np.savez(args.folder / f"unet_{args.size}.npz", x=steps.cumsum(-1) / 10)  # smooth along rows, as images are


if __name__ == "__main__":
    main()
