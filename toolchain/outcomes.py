"""Which samples a model judged rightly, as text that a report can keep: what a paired comparison of two runs needs."""

import base64

import numpy as np


def pack(right: np.ndarray) -> str:
    """A boolean for each sample [N] as base64 of its bits, 1.3 bytes for 8 samples."""
    return base64.b64encode(np.packbits(np.asarray(right, bool)).tobytes()).decode("ascii")


def unpack(text: str, samples: int) -> np.ndarray:
    """The booleans [samples] that `pack` was given."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=samples).astype(bool)


def differing(first: str, second: str, samples: int) -> tuple[int, int]:
    """Samples that only the first and that only the second judges rightly, both having judged the same ones in the same order."""
    a, b = unpack(first, samples), unpack(second, samples)
    return int((a & ~b).sum()), int((b & ~a).sum())
