"""Configuration: files and flags under one name, and typos that are caught."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.config import Config
from toolchain.config_file import dump_config, load_config, parse_precision, split
from toolchain.data_config import DataConfig
from toolchain.errors import UsageError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_dumped_configuration_loads_as_itself(tmp_path: Path) -> None:
    config = Config(
        weight_bits=3, units="manual", merge=("b01+b02",), iterations=7, merge_penalty=0.5, cross_stage=False, keep_float=("Gemm",)
    )
    data = DataConfig(eval_data="e.npz", max_drop=1.0, image_mean="0.1,0.2,0.3")
    assert split(load_config(written(tmp_path, dump_config(config, data)))) == (config, data)
    assert split(load_config(written(tmp_path, dump_config(Config(), DataConfig())))) == (Config(), DataConfig())


def test_both_spellings_and_the_shorthand(tmp_path: Path) -> None:
    values = load_config(written(tmp_path, 'precision = "w3a8"\nbatch-size = 4\nround_weight = 1\nfirst-last-bits = 8\n'))
    assert values == {"weight_bits": 3, "activation_bits": 8, "batch_size": 4, "round_weight": 1.0, "first_last_bits": "8"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 4", r"unknown key 'batchsize' \(did you mean 'batch-size'"),
        ("batch-size = 'many'", "'batch-size': expected int, got 'many'"),
        ("cross-stage = 1", "'cross-stage': expected bool, got 1"),
        ("iterations = true", "'iterations': expected int, got True"),
        ("keep-float = 'Gemm'", "expected a list of strings"),
        ("a = = 1", "is not TOML"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(written(tmp_path, text))
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "--weight-bits 1: must be from 2 to 8"),
        ({"weight_bits": 16}, "--weight-bits 16"),
        ({"activation_bits": 9}, "--activation-bits 9: must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        ({"algorithm": "qdrp"}, r"--algorithm qdrp: must be one of .* \(did you mean 'qdrop'\?\)"),
        ({"keep_probability": 1.5}, "--keep-probability 1.5: must be from 0.0 to 1.0"),
        ({"percentile": float("nan")}, "--percentile nan"),
        ({"iterations": 0}, "--iterations 0: must be at least 1"),
        ({"units": "manual"}, "--units manual needs at least one --merge"),
        ({"merge": ("b00+b01",)}, "--merge only goes with --units manual"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**options)


@pytest.mark.parametrize("text", ["w4", "4a4", "w4a4x", "", "wfour"])
def test_precision_shorthand_is_strict(text: str) -> None:
    assert parse_precision("W2a16") == {"weight_bits": 2, "activation_bits": 16}
    with pytest.raises(UsageError, match=r"expected w<bits>a<bits>"):
        parse_precision(text)


def test_paper_hyper_parameters_at_paper_iterations() -> None:
    settings = Config(preset="best").settings(has_depthwise=False)
    assert (settings.iterations, settings.batch_size, settings.weight_lr, settings.activation_lr) == (20000, 32, 1e-3, 1e-4)
    assert (settings.keep_probability, settings.round_weight, settings.warmup) == (0.5, 0.01, 0.2)
    assert (settings.beta_start, settings.beta_end) == (20.0, 2.0)
    assert Config().settings(has_depthwise=True).round_weight == 0.1
    assert Config(algorithm="brecq").settings(False).keep_probability == 1.0
    assert Config(algorithm="adaround").settings(False).activation_lr == 0.0


def test_large_samples_make_small_batches() -> None:
    """Up to 2 million floats a sample the papers' 32; an image of 1024 pixels with 64 channels leaves the least."""
    sizes = [0, 150_528, 1 << 21, (1 << 21) + 1, 1 << 22, 64 << 20]
    assert [Config().batch(size) for size in sizes] == [32, 32, 32, 16, 16, 4]
    assert {Config(batch_size=24).batch(size) for size in sizes} == {24}
    assert Config().settings(has_depthwise=False, largest=1 << 23).batch_size == 8


@given(st.integers(1, 40000))
def test_the_distance_that_parameters_can_travel_does_not_depend_on_the_iterations(iterations: int) -> None:
    settings = Config(iterations=iterations).settings(False)
    travel = settings.weight_lr * iterations
    if 200 <= iterations <= 20000:
        assert travel == pytest.approx(20.0)
    assert settings.weight_lr >= 1e-3


def test_every_field_explains_itself() -> None:
    for half in (Config, DataConfig):
        for spec in dataclasses.fields(half):
            assert spec.metadata["help"].endswith(".") or "[" in spec.metadata["help"]
            assert spec.metadata["section"]
