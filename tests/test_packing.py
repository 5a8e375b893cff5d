"""Cached activations in fewer bytes: codes give back every bit, what is on no grid is never forced onto one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import zoo
from toolchain.activations import Collector, Passes, TorchModel
from toolchain.config import Config
from toolchain.fake_quant import fake_quantize
from toolchain.memory import Room
from toolchain.minibatch import Draw
from toolchain.packing import Packed, Packing, packings
from toolchain.pipeline import quantize
from toolchain.quant_table import TensorQuant, activation_spec, float8_spec
from toolchain.source import infer_types
from toolchain.survey import survey


def grid(bits: int, symmetric: bool = False, scale: float = 0.1, zero_point: int = 0) -> TensorQuant:
    return TensorQuant(activation_spec(bits, symmetric), np.float32(scale), np.int32(zero_point))


@given(st.sampled_from([2, 3, 4, 8, 16]), st.booleans(), st.floats(1e-20, 1e20), st.integers(0, 65535), st.integers(0, 2**31))
def test_codes_give_back_every_bit(bits: int, symmetric: bool, scale: float, zero: int, seed: int) -> None:
    found = grid(bits, symmetric, scale, 0 if symmetric else zero % (1 << bits))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, 2, generator=generator) * (float(found.scale) * (1 << bits))
    x = fake_quantize(x.contiguous(memory_format=torch.channels_last), found)
    packing = Packing.on(found)
    assert packing is not None
    kept = packing.pack(x)
    assert kept is not None
    assert kept.element_size() == (1 if bits <= 8 else 2)
    assert kept.stride() == x.stride()
    again = packing.unpack(kept)
    assert again.stride() == x.stride()
    assert torch.equal(again.view(torch.int32), x.add(0.0).view(torch.int32))  # adding zero takes its sign away


def test_what_is_off_the_grid_is_refused() -> None:
    packing = Packing.on(grid(4))
    assert packing is not None
    for value in (0.05, 30.0, -0.1, float("nan"), float("inf")):  # between codes, beyond what a byte counts, no numbers
        assert packing.pack(torch.tensor([0.1, value])) is None
    assert Packing.on(replace(grid(8), spec=float8_spec(activation_spec(8, True)))) is None
    assert Packing.on(replace(grid(8), codes=np.zeros(3, np.int32))) is None
    assert packings(None, torch.float32) == []


def test_short_floats_round_and_refuse_what_they_cannot_reach() -> None:
    x = torch.tensor([1.0, 1e5, float("inf")])
    assert Packing(torch.float16).pack(x[:1]) is not None
    assert Packing(torch.float16).pack(x[:2]) is None  # beyond 65504
    kept = Packing(torch.bfloat16).pack(x)
    assert kept is not None
    assert Packing(torch.bfloat16).unpack(kept)[1] == pytest.approx(1e5, rel=2**-8)


def test_a_value_leaves_its_grid_halfway() -> None:
    """The first pass is on the grid, the second is not: nothing is lost, and every byte is accounted for."""
    room = Room()
    passes = Passes(5, 2, {"x"}, room)
    x = torch.tensor([0.1, 0.2, 0.3, 0.15, 1.5]).reshape(5, 1)
    x = fake_quantize(x, grid(4)).where(x != 0.15, x)
    collector = Collector(passes, is_stacked=True, grid=grid(4))
    for index, rows in enumerate(passes):
        collector.add(index, x[rows])
    assert isinstance(collector.value, torch.Tensor)  # no longer packed
    assert torch.equal(collector.value, x)
    assert room.used == 5 * 4


def test_passes_and_mini_batches_see_floats() -> None:
    x = fake_quantize(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)), grid(4, zero_point=7))
    x = x.contiguous(memory_format=torch.channels_last)
    passes = Passes(6, 4, {"x"})
    collector = Collector(passes, is_stacked=True, grid=grid(4, zero_point=7))
    for index, rows in enumerate(passes):
        collector.add(index, x[rows])
    packed = collector.value
    assert isinstance(packed, Packed)
    assert torch.equal(passes.part(packed, 1), x[4:])
    draw = Draw({"x": packed}, {"x": x}, {"x": x}, passes, 3, torch.Generator().manual_seed(0))
    fed, targets = draw.batch(torch.tensor([5, 0, 2]), None)
    assert torch.equal(fed["x"], targets["x"])
    assert fed["x"].stride() == targets["x"].stride()


def test_the_quantized_stream_is_kept_in_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    config = Config(device="cpu", algorithm="mse")
    table = quantize(source, samples, config).table
    types = infer_types(source, samples.shapes, samples.inputs)
    blocks = [row.block for row in survey(source, samples, config).rows]
    sizes = []
    for under in (None, table):
        room = Room()
        model = replace(TorchModel.of(source, types, blocks, torch.device("cpu")), room=room)
        stream = model.stream(samples.inputs, under)
        for piece in model.pieces[:2]:
            stream.advance(model.run(piece, stream, under))
        sizes.append(room.used)
    assert sizes[0] == 4 * sizes[1] > 0


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_short_floats_learn_as_well(kind: str, tmp_path: Path) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(48)
    found = [quantize(source, samples, Config(device="cpu", iterations=40, batch_size=8, cache_dtype=dtype)) for dtype in ("float32", kind)]
    losses = [sum(result.loss_after for result in run.results) for run in found]
    assert losses[1] < 1.15 * losses[0]  # other codes at close calls; 8 bits of mantissa are finer than the noise of 4-bit grids
