"""Run ESP-PPQ's block-wise LSQ fine-tuning on one model; needs ESP-PPQ's own virtual environment (see README.md).

Recipe: quantize_onnx_model for TRT_INT8 with a derived quantizer (the tool's documented way to change bit widths), calibration,
LearnedStepSizePass on blocks of depth 4. `--iterations 0` skips LSQ (round to nearest).
"""

import argparse
import random
import time
import traceback
from importlib.metadata import version

import numpy as np
import torch
from common import Cost, base_parser, write_result
from esp_ppq import QuantizationSettingFactory, TargetPlatform, TorchExecutor
from esp_ppq.api import export_ppq_graph, load_onnx_graph, quantize_onnx_model, register_network_quantizer
from esp_ppq.core import PASSIVE_OPERATIONS, QuantizationPolicy, QuantizationProperty
from esp_ppq.IR import BaseGraph, QuantableOperation
from esp_ppq.quantization.optim import LearnedStepSizePass
from esp_ppq.quantization.quantizer.TensorRTQuantizer import TensorRTQuantizer, TensorRTQuantizer_InputOnly

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def ends_of(graph: BaseGraph) -> tuple[set[str], set[str]]:
    """First and last weighted operation, and the tensors they read, followed upwards through Reshape and the like."""
    weighted = [op for op in graph.topological_sort() if op.type in WEIGHTED and op.inputs[1].is_parameter]
    ends, tensors = [weighted[0], weighted[-1]], set()
    for op in ends:
        tensor = op.inputs[0]
        tensors.add(tensor.name)
        while tensor.source_op is not None and tensor.source_op.type in PASSIVE_OPERATIONS:
            tensor = tensor.source_op.inputs[0]
            tensors.add(tensor.name)
    return {op.name for op in ends}, tensors


def register_quantizer(args: argparse.Namespace) -> None:
    """Install a TensorRT quantizer with the requested widths; `inputs` quantizes only what weighted layers read."""
    ends, wide = ends_of(load_onnx_graph(str(args.model))) if args.first_last == "8" else (set(), set())
    base = TensorRTQuantizer if args.placement == "stock" else TensorRTQuantizer_InputOnly
    grid = QuantizationProperty.SYMMETRICAL if args.grid == "symmetric" else QuantizationProperty.ASYMMETRICAL
    activations = QuantizationPolicy(grid + QuantizationProperty.LINEAR + QuantizationProperty.PER_TENSOR)

    class PeerQuantizer(base):  # type: ignore[misc, valid-type]
        @property
        def quant_operation_types(self) -> set[str]:
            return super().quant_operation_types if args.placement == "stock" else WEIGHTED

        def init_quantize_config(self, operation):
            config = super().init_quantize_config(operation)
            pairs = [*zip(config.input_quantization_config, operation.inputs, strict=True),
                     *zip(config.output_quantization_config, operation.outputs, strict=True)]  # fmt: skip
            for index, (cfg, var) in enumerate(pairs):
                is_weight = operation.type in WEIGHTED and index == 1 and var.is_parameter
                bits = args.weight_bits if is_weight else args.activation_bits
                if operation.name in ends if is_weight else var.name in wide:
                    bits = 8
                cfg.num_of_bits = bits
                if is_weight or args.grid == "symmetric":
                    cfg.quant_min, cfg.quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                else:
                    cfg.policy, cfg.quant_min, cfg.quant_max = activations, 0, 2**bits - 1
            return config

    register_network_quantizer(PeerQuantizer, TargetPlatform.TRT_INT8)


def describe(graph: BaseGraph) -> dict:
    """Widths and states of what is really quantized, as `operation:tensor`."""
    rows: dict[str, dict] = {"weight_bits": {}, "activation_bits": {}}
    for op in graph.operations.values():
        for cfg, var in op.config_with_variable if isinstance(op, QuantableOperation) else []:
            if cfg.state.name in ("ACTIVATED", "BAKED") and cfg.dominated_by is cfg:
                rows["weight_bits" if var.is_parameter else "activation_bits"][f"{op.name}:{var.name}"] = cfg.num_of_bits
    return rows


def main() -> None:
    parser = base_parser(__doc__ or "", 500, "LSQ steps per block; 500 is the tool's default")
    parser.add_argument("--lr", type=float, default=5e-5, help="the pass's own default; the settings object has 1e-5")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--observer", choices=["percentile", "minmax", "mse", "kl"], default="mse")
    parser.add_argument("--grid", choices=["asymmetric", "symmetric"], default="asymmetric")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)
    cost = Cost()

    ((_, data),) = np.load(args.calibration).items()
    data = torch.from_numpy(data[: args.samples])
    args.samples, batches = len(data), list(data.split(args.batch_size))
    register_quantizer(args)
    setting = QuantizationSettingFactory.trt_setting()
    setting.quantize_activation_setting.calib_algorithm = args.observer
    if args.placement == "inputs":  # the default dispatcher would silently leave a Gemm behind a Reshape in float
        setting.dispatcher = "allin"
    setting.lsq_optimization = args.iterations > 0
    lsq = setting.lsq_optimization_setting
    lsq.steps, lsq.lr, lsq.block_size, lsq.collecting_device = args.iterations, args.lr, args.block_size, "cpu"

    optimize = LearnedStepSizePass.optimize

    def timed(self, *positional, **named) -> None:
        before, processor = time.perf_counter(), time.process_time()
        optimize(self, *positional, **named)
        cost.optimisation += time.perf_counter() - before
        cost.optimisation_cpu += time.process_time() - processor

    LearnedStepSizePass.optimize = timed
    graph = quantize_onnx_model(
        str(args.model), batches, calib_steps=len(batches), input_shape=list(batches[0].shape), setting=setting,
        platform=TargetPlatform.TRT_INT8, device="cpu",
    )  # fmt: skip
    cost.stop()

    if args.eval:  # before the export, which modifies the graph
        executor = TorchExecutor(graph, device="cpu")
        inputs = torch.from_numpy(np.load(args.eval)[next(iter(graph.inputs))])
        with torch.no_grad():
            logits = [executor.forward(chunk)[0].numpy() for chunk in inputs.split(100)]
        np.savez(args.out / "logits.npz", logits=np.concatenate(logits))
    applied, error = describe(graph), None
    try:
        export_ppq_graph(graph, TargetPlatform.ONNXRUNTIME, graph_save_to=str(args.out / "quantized.onnx"))
    except Exception:
        error = traceback.format_exc()[-1500:]
    write_result(
        args, cost, error, tool="esp-ppq LSQ", version=version("esp-ppq"), weight_scheme="minmax, then learned", lr=args.lr,
        block_size=args.block_size, activation_grid=f"per-tensor {args.grid}, {args.observer}, then learned", applied=applied,
    )  # fmt: skip


if __name__ == "__main__":
    main()
