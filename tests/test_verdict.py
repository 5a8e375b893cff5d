"""The sentence for the one who ships: every way it can go."""

from typing import Any

import pytest

from toolchain.kernels import KernelCheck
from toolchain.validation import Latency, Parity, ValidationReport
from toolchain.verdict import verdict

UNLABELLED: dict[str, Any] = {"top1_float": None, "top1_quantized": None, "lost": None, "won": None}


def validated(**changes: Any) -> ValidationReport:
    facts: dict[str, Any] = {
        "provider": "CPUExecutionProvider", "samples": 10000, "top1_float": 90.0, "top1_quantized": 89.8, "top5_float": None,
        "top5_quantized": None, "lost": 60, "won": 40, "agreement": 97.0, "sqnr": {"y": 20.0}, "simulation": None,
        "simulated_arithmetic": None,
        "unfused": Parity(100.0, 60.0, 0.0), "integer_arithmetic": KernelCheck(3, "v", 1.0, 0.0), "top1_simulated": None,
        "float_bytes": 4, "quantized_bytes": 1, "latency": Latency(1, 2.0, 1.0), "kernels": {},
    }  # fmt: skip
    return ValidationReport(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "limit", "held_out", "ship", "words"),
    [
        ({}, None, True, "yes", "0.20 points lower (95 %: -0.40 to -0.00), within the yardstick of 1 point without --max-drop"),
        ({"lost": 400, "won": 100, "top1_quantized": 87.0}, None, True, "no", "3.00 points lower"),
        ({"lost": 200, "won": 100, "top1_quantized": 89.0}, None, True, "unclear", "more labelled samples would decide"),
        ({"lost": 200, "won": 100, "top1_quantized": 89.0}, 2.0, True, "yes", "within --max-drop 2"),
        ({"lost": 200, "won": 100, "top1_quantized": 89.0}, 0.9, True, "no", "the limit is --max-drop 0.9"),
        ({"lost": 40, "won": 60, "top1_quantized": 90.2}, None, True, "yes", "0.20 points higher (95 %: +0.00 to +0.40)"),
        ({}, None, False, "unclear", "on the samples it was calibrated on; give --eval-data"),
        ({"lost": 400, "won": 100, "top1_quantized": 87.0}, None, False, "no", "even on the samples it was calibrated on, more than"),
        (
            {"integer_arithmetic": KernelCheck(3, "conv", 9.0, 0.5)},
            None, True, "no", "conv: on this machine ONNX Runtime's kernel is 9 steps",
        ),
        ({"simulated_arithmetic": KernelCheck(3, "conv", 3.0, 0.5)}, None, True, "no", "conv: the written file is 3 steps off"),
        ({"simulation": Parity(90.0, 5.0, 0.3)}, None, True, "no", "differs from the simulation"),
        (UNLABELLED | {"agreement": 99.9}, None, True, "yes", "0.10 % of the predictions differ"),
        (UNLABELLED | {"agreement": 80.0}, None, True, "unclear", "accuracy drops by that at most, labels would tell by how much"),
        (UNLABELLED | {"agreement": 80.0}, None, False, "unclear", "on the samples it was calibrated on; give --eval-data"),
        (UNLABELLED | {"agreement": 80.0}, 5.0, True, "no", "the limit is --max-drop 5"),
        (UNLABELLED | {"agreement": 40.0, "sqnr": {"a": 9.0, "y": 1.0}}, None, True, "no", "output 'y' has noise of more than half"),
        (UNLABELLED | {"agreement": None}, None, True, "unclear", "SQNR of 20.0 dB"),
    ],
)  # fmt: skip
def test_verdict(changes: dict[str, Any], limit: float | None, held_out: bool, ship: str, words: str) -> None:
    found = verdict(validated(**changes), limit, held_out)
    assert found.ship == ship, found.sentence
    assert words in found.sentence
