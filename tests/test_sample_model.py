"""The embedded sample end to end: 4-bit rounding hurts it, reconstruction mends it, and ONNX Runtime executes what was learned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import export_qdq, write_model
from toolchain.config import Config
from toolchain.noise import sqnr
from toolchain.pipeline import Quantized, quantize
from toolchain.samples import Preprocessing, Samples, load_samples
from toolchain.simulation import simulate
from toolchain.source import SourceModel, load_source
from toolchain.validation import ValidationReport, validate

FOLDER = Path(__file__).parent.parent / "sample_models"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source() -> SourceModel:
    return load_source(FOLDER / "mobilenetv2_x0.5_cifar10.onnx")


def samples(source: SourceModel, kind: str) -> Samples:
    return load_samples(str(FOLDER / f"cifar10_{kind}.npz"), source.inputs, Preprocessing(), "--data")


def run(source: SourceModel, folder: Path, **options: Any) -> tuple[Quantized, ValidationReport]:
    settings: dict[str, Any] = {"device": "cpu", "calibration_samples": 128, **options}
    found = quantize(source, samples(source, "calibration"), Config(**settings))
    evaluation = samples(source, "evaluation").first(300)
    path = folder / "q.onnx"
    write_model(export_qdq(source.model, found.table), path)
    return found, validate(
        source.model, path, evaluation, source.path.stat().st_size, "cpu", simulate(source, found.table, evaluation, CPU)
    )


@pytest.fixture(scope="module")
def reconstructed(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, ValidationReport]:
    return run(source, tmp_path_factory.mktemp("qdrop"), iterations=40, batch_size=16)


@pytest.fixture(scope="module")
def rounded(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> ValidationReport:
    return run(source, tmp_path_factory.mktemp("mse"), algorithm="mse", bias_correction=False)[1]


def test_reconstruction_mends_what_rounding_breaks(reconstructed: tuple[Quantized, ValidationReport], rounded: ValidationReport) -> None:
    _, checked = reconstructed
    assert checked.top1_float is not None
    assert checked.top1_quantized is not None
    assert rounded.top1_quantized is not None
    assert checked.top1_float - rounded.top1_quantized > 12
    # 40 iterations on 128 images regain a good part of it; 300 images have a standard error of 2 points
    assert checked.top1_quantized - rounded.top1_quantized > 6
    assert checked.sqnr["logits"] > rounded.sqnr["logits"] + 2


def test_onnxruntime_executes_what_was_learned(reconstructed: tuple[Quantized, ValidationReport]) -> None:
    _, checked = reconstructed
    assert checked.simulation is not None
    assert checked.simulation.agreement is not None
    assert checked.simulation.agreement >= 99.0  # of 300
    assert checked.unfused is not None
    assert checked.unfused.agreement is not None
    assert checked.unfused.agreement >= 99.0
    assert checked.top1_simulated == pytest.approx(checked.top1_quantized, abs=0.7)  # two of 300


def test_every_layer_runs_on_integers_in_a_smaller_file(reconstructed: tuple[Quantized, ValidationReport]) -> None:
    _, checked = reconstructed
    assert not checked.float_layers
    assert checked.kernels["QLinearConv"] == 52
    assert checked.quantized_bytes < 0.4 * checked.float_bytes


def test_the_loss_drops_where_the_paper_says(reconstructed: tuple[Quantized, ValidationReport]) -> None:
    """Merges join the last block of a stage with the one that opens the next, as in the released schemes; stem and head stay alone."""
    found, _ = reconstructed
    opening = {i for i, row in enumerate(found.plan.rows) if row.traits.is_transition}
    assert found.plan.merged >= {9, 12, 15}
    assert sum(boundary + 1 in opening for boundary in found.plan.merged) >= 4
    assert not {0, 16} & found.plan.merged


def test_import_is_exact(reconstructed: tuple[Quantized, ValidationReport]) -> None:
    assert reconstructed[0].import_error < 1e-5  # float32 summation order through 53 layers


def test_8_bits_lose_next_to_nothing(source: SourceModel, tmp_path: Path) -> None:
    _, checked = run(source, tmp_path, algorithm="mse", weight_bits=8, activation_bits=8)
    assert checked.agreement is not None
    assert checked.agreement >= 97
    assert checked.sqnr["logits"] > 25


def test_sqnr_of_known_noise() -> None:
    signal = np.ones(1000)
    assert sqnr(signal, signal * 1.1) == pytest.approx(20.0)
    assert sqnr(signal, signal) == float("inf")
