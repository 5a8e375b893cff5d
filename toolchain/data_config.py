"""Where a run's samples come from, and how images are prepared."""

import dataclasses
import re
from dataclasses import dataclass

from .errors import UsageError
from .option import check, flag, option

SYNTHETIC = "synthetic"  # calibration data that is made, not read


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from, how images are prepared, and what is asked of the result."""

    calibration_data: str | None = option(
        None,
        "Calibration samples: .npz (arrays by input name), .npy, an image folder, or module:function; `synthetic` makes some from the "
        "statistics of BatchNorm layers (ZeroQ), where there are no real ones.",
        "data",
        is_file=True,
    )
    synthetic_samples: int = option(64, "Samples to make with --calibration-data synthetic.", "data", low=1)
    eval_data: str | None = option(None, "Evaluation samples, with labels where accuracy is wanted; same forms.", "data", is_file=True)
    eval_samples: int | None = option(None, "Most evaluation samples to use; default all.", "data", low=1)
    labels: str | None = option(None, "CSV of `file name,class number` for an evaluation image folder.", "data", is_file=True)
    metric: str | None = option(
        None,
        "A measure of your own in place of top-1: module:function, given the outputs (arrays by name) and the labels (of any kind); it "
        "returns one number for each sample, or one for all; higher is better.",
        "data",
    )
    max_drop: float | None = option(
        None,
        "Largest drop allowed, in points of top-1 (of agreement without labels) or in the unit of --metric; more gives exit code 6.",
        "data",
        low=0.0,
    )
    image_preset: str = option("imagenet", "Image preprocessing.", "images", choices=("imagenet", "tf", "raw01", "raw255"))
    image_size: str | None = option(None, "Height and width, as 224 or 224x320; default: the model's.", "images")
    image_crop: str | None = option(None, "Share of the shorter side that the centre crop keeps; `none`: squeeze.", "images")
    image_filter: str = option("bilinear", "Resampling.", "images", choices=("nearest", "bilinear", "bicubic", "lanczos"))
    image_mean: str | None = option(None, "Mean by channel on a scale of 0 to 1, as 0.485,0.456,0.406.", "images")
    image_std: str | None = option(None, "Standard deviation by channel on a scale of 0 to 1.", "images")
    image_layout: str | None = option(
        None, "Layout of the model's input; default: told from its shape.", "images", choices=("nchw", "nhwc")
    )
    image_channels: str = option("rgb", "Channel order.", "images", choices=("rgb", "bgr"))

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check(spec, getattr(self, spec.name))
        if self.metric is not None and not all(self.metric.partition(":")[::2]):
            raise UsageError(f"--metric {self.metric}: expected module:function")
        if self.metric is None and (self.max_drop or 0.0) > 100:
            raise UsageError(f"--max-drop {self.max_drop}: must be from 0.0 to 100.0")
        for name in ("image_size", "image_crop", "image_mean", "image_std"):
            getattr(self, name.removeprefix("image_"))  # refuse bad spellings early

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels."""
        if self.image_size is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.image_size)
        if match is None or int(match[1]) < 1 or int(match[2] or match[1]) < 1:
            raise UsageError(f"--image-size {self.image_size}: expected a number of pixels, or HEIGHTxWIDTH")
        return int(match[1]), int(match[2] or match[1])

    @property
    def crop(self) -> float | None:
        """0 to 1; None where nothing was said or nothing is cropped (`image_crop` tells which)."""
        if self.image_crop is None or self.image_crop == "none":
            return None
        share = _floats("image_crop", self.image_crop)
        if len(share) != 1 or not 0 < share[0] <= 1:
            raise UsageError(f"--image-crop {self.image_crop}: expected a share above 0 and up to 1, or `none`")
        return share[0]

    @property
    def mean(self) -> tuple[float, ...] | None:
        return None if self.image_mean is None else _floats("image_mean", self.image_mean)

    @property
    def std(self) -> tuple[float, ...] | None:
        if self.image_std is None:
            return None
        values = _floats("image_std", self.image_std)
        if min(values) <= 0:
            raise UsageError(f"--image-std {self.image_std}: must be above 0")
        return values


def _floats(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag(name)} {text!r}: expected numbers separated by commas") from None
