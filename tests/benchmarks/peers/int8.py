"""Write the W8A8 file that one peer makes of a model for ONNX Runtime's CPU provider; each tool needs its own environment (see README.md).

usage: int8.py TOOL MODEL.onnx --calibration CALIB.npz --out FILE.onnx [--samples 128]

TOOL is one of the functions below, whose docstrings say what was chosen, and why. Nothing learns: round to nearest, as each tool does it.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

Batches = list[dict[str, np.ndarray]]


class Reader:
    """Batches as ONNX Runtime's tools want them."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._left: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self._batches)


def quantize_static(model: Path, batches: Batches, out: Path, activations: str = "QUInt8") -> None:
    """ONNX Runtime's own, as its documentation advises: quant_pre_process, QDQ, int8 weights per channel, uint8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(Reader, CalibrationDataReader):
        pass

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        try:
            quant_pre_process(str(model), str(ready))
        except Exception:  # symbolic shape inference gives up on transformers; its documentation has this flag for that
            quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready), str(out), Calibration(batches), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType[activations], weight_type=QuantType.QInt8,
        )  # fmt: skip


def quantize_static_s8s8(model: Path, batches: Batches, out: Path) -> None:
    """The same with int8 activations, the default of quantize_static."""
    quantize_static(model, batches, out, "QInt8")


def nncf(model: Path, batches: Batches, out: Path) -> None:
    """NNCF's default: performance preset (activations around zero), fast bias correction."""
    import nncf

    onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(batches), subset_size=len(batches)), out)


def nncf_mixed(model: Path, batches: Batches, out: Path) -> None:
    """NNCF with zero points for activations."""
    import nncf

    mixed = nncf.quantize(onnx.load(model), nncf.Dataset(batches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))
    onnx.save(mixed, out)


def quark(model: Path, batches: Batches, out: Path) -> None:
    """AMD Quark: uint8 activations and int8 weights per channel (its presets have int8 and per tensor), which fuse best."""
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import Int8Spec, ModelQuantizer, QConfig, QLayerConfig, UInt8Spec
    from quark.onnx.quantization.config.spec import QuantGranularity

    class Calibration(Reader, CalibrationDataReader):
        pass

    grids = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec(quant_granularity=QuantGranularity.Channel))
    ModelQuantizer(QConfig(global_config=grids)).quantize_model(str(model), str(out), Calibration(batches))


def aimet(model: Path, batches: Batches, out: Path) -> None:
    """AIMET: BatchNorm folded, its default placement, weights per channel, uint8 activations by `tf_enhanced` ranges."""
    import aimet_onnx
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

    loaded = onnx.load(model)
    fold_all_batch_norms_to_weight(loaded)
    sim = aimet_onnx.QuantizationSimModel(loaded, param_type="int8", activation_type="int8", quant_scheme="tf_enhanced")
    sim.compute_encodings(batches)
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True), out)


def modelopt(model: Path, batches: Batches, out: Path) -> None:
    """NVIDIA Model Optimizer: for TensorRT; `max` ranges (its default, entropy, is 11 dB worse), int8 weights in the file, the rest fp32."""
    from modelopt.onnx.quantization import quantize

    data = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    quantize(
        str(model), calibration_data=data, calibration_method="max", calibration_eps=["cpu"], output_path=str(out),
        high_precision_dtype="fp32", dq_only=True,
    )  # fmt: skip


TOOLS = {tool.__name__: tool for tool in (quantize_static, quantize_static_s8s8, nncf, nncf_mixed, quark, aimet, modelopt)}


def main() -> None:
    """Quantize with one tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    data = {name: array[: args.samples] for name, array in np.load(args.calibration).items() if name != "labels"}
    starts = range(0, len(next(iter(data.values()))), args.batch_size)
    batches = [{name: x[i : i + args.batch_size] for name, x in data.items()} for i in starts]
    with tempfile.TemporaryDirectory() as folder:
        TOOLS[args.tool](Path(shutil.copy(args.model, folder)), batches, args.out)  # Model Optimizer writes into the file that it is given


if __name__ == "__main__":
    main()
