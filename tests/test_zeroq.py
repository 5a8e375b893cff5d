"""ZeroQ: samples whose statistics are those that BatchNorm kept, from files as they are exported, and errors that say what to do."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests import zoo
from toolchain.baselines import zeroq
from toolchain.baselines.zeroq import norm_statistics, synthetic_samples
from toolchain.cli import main
from toolchain.errors import DataError
from toolchain.quant_table import QuantTable
from toolchain.samples import Samples
from toolchain.simulation import simulated_values
from toolchain.source import load_source


def trained(folder: Path, shape: tuple[int | str, ...] = ("N", 3, 8, 8), norm: bool = True) -> Path:
    """Two convolutions with BatchNorm whose statistics are those of "training" images that are anything but normal noise."""
    images = training_images()
    path, statistics = folder / "trained.onnx", list[tuple[np.ndarray, np.ndarray]]()
    for layers in range(1, 4):  # the statistics of a layer need those before it
        b = zoo.Builder({"x": list(shape)})
        x, read = "x", ""
        for layer in range(min(layers, 2)):
            read = b.conv(x, 3 if layer == 0 else 8, 8, stride=layer + 1, bias=False)
            if layer < len(statistics):
                x = batch_norm(b, read, statistics[layer]) if norm else read
                x = b.op("Relu", x)
        onnx.save(b.model(b.head(x, 8)) if layers == 3 else b.model(read), path)
        if layers < 3:
            values = simulated_values(load_source(path), QuantTable(), images)[read]
            statistics.append((values.mean((0, 2, 3)), values.var((0, 2, 3))))
    return path


def batch_norm(b: zoo.Builder, x: str, statistics: tuple[np.ndarray, np.ndarray]) -> str:
    rng = np.random.default_rng(len(b.nodes))
    gamma, beta = rng.normal(1.0, 0.3, 8), rng.normal(0.2, 0.5, 8)
    gamma[3] = 0.0  # a channel that says nothing of what BatchNorm read
    mean, variance = statistics
    names = [b.constant(f"{x}_{n}", np.asarray(a, np.float32)) for n, a in (("g", gamma), ("b", beta), ("m", mean), ("v", variance))]
    return b.op("BatchNormalization", x, *names, name=f"{x}_norm")


def training_images() -> Samples:
    return Samples({"x": 2.0 * zoo.images(128, seed=7).inputs["x"] + 1.5})


def test_statistics_are_those_of_the_file(tmp_path: Path) -> None:
    path = trained(tmp_path)
    source = load_source(path)
    found = norm_statistics(path)
    assert len(found) == 2
    assert all(s.value in source.graph.producer for s in found)  # BatchNorm is folded, its output is not gone
    assert "BatchNormalization" not in {node.op_type for node in source.graph.nodes}
    values = simulated_values(source, QuantTable(), training_images())
    for s in found:
        made = values[s.value]
        expected_mean = np.delete((made.mean((0, 2, 3)) - s.offset) / np.where(s.gain == 0, 1, s.gain), 3)
        np.testing.assert_allclose(expected_mean, 0.0, atol=1e-4)  # float32 means


def test_constants_count_as_parameters(tmp_path: Path) -> None:
    path = trained(tmp_path)
    expected = norm_statistics(path)
    model = onnx.load(path)
    norms = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[1:]}
    lifted = [tensor for tensor in model.graph.initializer if tensor.name in norms]
    for tensor in lifted:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    onnx.save(model, path)
    found = norm_statistics(path)
    assert all(np.array_equal(a.mean, b.mean) and np.array_equal(a.gain, b.gain) for a, b in zip(expected, found, strict=True))


def test_samples_have_the_statistics_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(trained(tmp_path))
    monkeypatch.setattr(zeroq, "_STEPS", 150)
    made = synthetic_samples(source, 30, seed=0, device="cpu")
    assert made.inputs["x"].shape == (30, 3, 8, 8)
    assert made.inputs["x"].dtype == np.float32
    assert made.note is not None
    assert "30 samples distilled from the statistics of 2 BatchNorm layers" in made.note
    noise = Samples({"x": np.random.default_rng(0).normal(size=(30, 3, 8, 8)).astype(np.float32)})
    real, ours, random = (simulated_values(source, QuantTable(), samples) for samples in (training_images(), made, noise))
    for s in norm_statistics(source.path):
        kept = s.gain != 0
        moments = [np.concatenate([v[s.value].mean((0, 2, 3))[kept], v[s.value].std((0, 2, 3))[kept]]) for v in (real, ours, random)]
        assert np.abs(moments[1] - moments[0]).max() < 0.2 * np.abs(moments[2] - moments[0]).max()


def test_the_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroq, "_STEPS", 5)
    source = load_source(trained(tmp_path))
    one, two, other = (synthetic_samples(source, 40, seed=seed, device="cpu").inputs["x"] for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.shape == (40, 3, 8, 8)
    assert not np.array_equal(one[:8], one[32:])  # each batch starts from noise of its own


def test_a_fixed_batch_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroq, "_STEPS", 5)
    source = load_source(trained(tmp_path, (4, 3, 8, 8)))
    assert synthetic_samples(source, 6, seed=0, device="cpu").count == 6


@pytest.mark.parametrize(
    ("shape", "norm", "message"),
    [
        (("N", 3, 8, 8), False, "has no BatchNorm statistics .* export the model with BatchNorm kept"),
        (("N", 3, "H", "W"), True, "leaves the size of its input open .* give --image-size"),
    ],
)
def test_errors_say_what_to_do(shape: tuple[int | str, ...], norm: bool, message: str, tmp_path: Path) -> None:
    source = load_source(trained(tmp_path, shape, norm))
    with pytest.raises(DataError, match=message):
        synthetic_samples(source, 4, seed=0, device="cpu")


def test_an_open_size_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroq, "_STEPS", 2)
    source = load_source(trained(tmp_path, ("N", 3, "H", "W")))
    assert synthetic_samples(source, 2, seed=0, size=(8, 12), device="cpu").inputs["x"].shape == (2, 3, 8, 12)


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8], "y": ["N", 3, 8, 8]})
    source = zoo.loaded(b.model(b.conv(b.op("Add", "x", "y"), 3, 4)), tmp_path)
    with pytest.raises(DataError, match="one float32 input"):
        synthetic_samples(source, 4, seed=0, device="cpu")


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroq, "_STEPS", 20)
    path = trained(tmp_path)
    np.savez(tmp_path / "eval.npz", **training_images().first(16).inputs)  # pyright: ignore[reportArgumentType]
    common = [str(path), "--calibration-data", "synthetic", "--synthetic-samples", "8", "--eval-data", str(tmp_path / "eval.npz")]
    result = CliRunner().invoke(main, ["quantize", *common, "--algorithm", "mse", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "8 samples distilled from the statistics of 2 BatchNorm layers" in " ".join(result.stderr.split())
    assert "no real sample was seen" in " ".join(result.stdout.split())
    report = (tmp_path / "trained.w4a4.report" / "report.json").read_text(encoding="utf-8")
    assert "no real sample was seen" in report
    page = (tmp_path / "trained.w4a4.report" / "report.html").read_text(encoding="utf-8")
    assert "no real sample was seen" in page


def test_compare_distils_once_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def distilled(source: object, count: int, seed: int, *_: object) -> Samples:
        seeds.append(seed)
        return Samples({"x": zoo.images(count, seed=seed).inputs["x"]}, note="distilled")

    monkeypatch.setattr(zeroq, "synthetic_samples", distilled)
    path, calibration, evaluation, results = (tmp_path / name for name in ("trained.onnx", "calibration.npz", "eval.npz", "out.json"))
    trained(tmp_path)
    for place in (calibration, evaluation):
        np.savez(place, x=training_images().first(16).inputs["x"])
    data = ["--calibration-data", str(calibration), "--eval-data", str(evaluation), "--synthetic-samples", "8", "--device", "cpu"]
    compare = ["compare", str(path), *data, "--methods", "mse,zeroq+mse", "--precisions", "w4a4,w3a3", "--seeds", "0,1", "-o", str(results)]
    for _ in range(2):
        result = CliRunner().invoke(main, compare)
        assert result.exit_code == 0, result.output
        assert seeds == [0, 1]  # not once for each precision, and not again for rows that the file has
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert sorted(row["calibration_samples"] for row in rows) == [8] * 4 + [16] * 4
    page = results.with_suffix(".html").read_text(encoding="utf-8")
    assert "16 calibration and 16 evaluation samples" in page
    assert "zeroq+mse: 8 samples distilled from BatchNorm statistics alone, no real ones" in page
    trained(tmp_path, norm=False)
    result = CliRunner().invoke(main, compare)
    assert result.exit_code == DataError.exit_code, result.output
    assert "has no BatchNorm statistics" in " ".join(result.stderr.split())
