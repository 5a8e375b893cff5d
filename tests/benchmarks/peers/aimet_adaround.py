"""Run AIMET-ONNX AdaRound on one model; needs AIMET's own virtual environment (see README.md).

Recipe: fold BatchNorm, QuantizationSimModel (per-channel symmetric weights, asymmetric unsigned activations), apply_adaround with
the tool's defaults, calibrate the activations, export QDQ. `--iterations 0` skips AdaRound (round to nearest).
"""

import argparse
import json
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import aimet_onnx
import numpy as np
import onnx
import torch
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.common.defs import QuantScheme
from aimet_onnx.quantsim import QuantizationSimModel, _apply_constraints, set_param_type
from common import Cost, base_parser, write_result

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weighted_nodes(sim: QuantizationSimModel) -> list:
    """Operations with a quantized weight, in the order of the file (connected_graph's order puts shape arithmetic first)."""
    order = {node.name: i for i, node in enumerate(sim.model.model.graph.node)}
    ops = [op for op in sim.connected_graph.ordered_ops if op.type in WEIGHTED and "weight" in sim.get_op_quantizers(op)[2]]
    return sorted(ops, key=lambda op: order[op.name])


def keep_layer_inputs_only(sim: QuantizationSimModel) -> None:
    """Disable every activation quantizer that no weighted layer reads (through Reshape and the like).

    Stock placement also quantizes the logits, the convolutions that feed an Add and, as its Conv+Clip rule misses depthwise
    convolutions, some tensors both before and after a ReLU6. Papers, and tools that follow them, quantize layer inputs only.
    A configuration file with `is_input_quantized` cannot say this: it leaves a layer behind a Reshape without a quantizer.
    """
    kept = {sim._get_enabled_quantizer_name(op.inputs[0].name) for op in weighted_nodes(sim)}
    for name in set(sim.activation_names) - kept:
        sim.qc_quantize_op_dict[name].enabled = False


def build(model: onnx.ModelProto, args: argparse.Namespace) -> QuantizationSimModel:
    # Stock AIMET ties the input and the output of AveragePool to one scale (a DSP constraint), although its documentation says
    # that the default does not; a global average has a far smaller range than its input, so untying favours the peer.
    with _apply_constraints(args.placement == "stock"):
        sim = QuantizationSimModel(
            model, param_type=f"int{args.weight_bits}", activation_type=f"int{args.activation_bits}",
            quant_scheme=args.weight_scheme.replace("seq_mse", "min_max"),
            session_options_kwargs={"intra_op_num_threads": args.threads},
        )  # fmt: skip
    for name in sim.activation_names:
        sim.qc_quantize_op_dict[name].set_quant_scheme(QuantScheme.from_str(args.activation_scheme))
    if args.placement == "inputs":
        keep_layer_inputs_only(sim)
    if args.first_last == "8":
        ends = [weighted_nodes(sim)[i] for i in (0, -1)]
        set_param_type(sim, "int8", nodes_to_include={op.name for op in ends})
        sim.set_tensor_precision([op.inputs[0].name for op in ends], "int8")
    return sim


def restore(sim: QuantizationSimModel, path: Path) -> None:
    """Take over the weights of an earlier run, with the encodings they were rounded for."""
    sim._compute_param_encodings(overwrite=False)  # what apply_adaround does first
    saved = np.load(path)
    for tensor in sim.model.model.graph.initializer:
        if tensor.name in saved:
            tensor.CopyFrom(onnx.numpy_helper.from_array(saved[tensor.name], tensor.name))
            sim.qc_quantize_op_dict[tensor.name].freeze_encodings()
    sim._rebuild_session()


def describe(sim: QuantizationSimModel) -> dict:
    """What is really quantized: options can be applied to a tied quantizer, or to none."""
    weights = {op.name: sim.get_op_quantizers(op)[2]["weight"].bitwidth for op in weighted_nodes(sim)}
    quantizers = {name: sim.qc_quantize_op_dict[name] for name in sim.activation_names}
    return {"weight_bits": weights, "activation_bits": {name: q.bitwidth for name, q in quantizers.items() if q.enabled}}


def main() -> None:
    parser = base_parser(__doc__ or "", 15000, "per layer; the tool recommends 15000 below 8 bits")
    parser.add_argument("--weight-scheme", choices=["min_max", "tf_enhanced", "seq_mse"], default="min_max")
    parser.add_argument("--activation-scheme", choices=["min_max", "tf_enhanced"], default="tf_enhanced")
    parser.add_argument("--reuse", type=Path, metavar="OUT_DIR", help="weights of a run that differs in activations only: "
                        "AdaRound switches all activation quantizers off, so they are the same")  # fmt: skip
    args = parser.parse_args()
    if args.reuse and args.weight_scheme == "seq_mse":
        parser.error("--reuse restores weights, not the encodings that seq_mse searched for")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    cost = Cost()

    data = {name: x[: args.samples] for name, x in np.load(args.calibration).items()}
    args.samples = len(next(iter(data.values())))
    batches = [{name: x[i : i + args.batch_size] for name, x in data.items()} for i in range(0, args.samples, args.batch_size)]
    model = onnx.load(args.model)
    fold_all_batch_norms_to_weight(model)
    sim = build(model, args)

    before, processor = time.perf_counter(), time.process_time()
    if args.weight_scheme == "seq_mse":
        aimet_onnx.apply_seq_mse(sim, batches)
    if args.reuse:
        restore(sim, args.reuse / "adarounded.npz")
    elif args.iterations:
        aimet_onnx.apply_adaround(sim, batches, num_iterations=args.iterations)
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in sim.model.model.graph.initializer if t.name in sim.param_names}
        np.savez(args.out / "adarounded.npz", **weights)
    cost.optimisation, cost.optimisation_cpu = time.perf_counter() - before, time.process_time() - processor
    sim.compute_encodings(batches)
    cost.stop()
    if args.reuse:  # charge this run with what it did not have to do again
        earlier = json.loads((args.reuse / "result.json").read_text())
        keys = ("model", "samples", "weight_bits", "first_last", "weight_scheme", "iterations", "batch_size", "seed")
        now = {**vars(args), "model": args.model.name}
        if differing := [key for key in keys if earlier[key] != now[key]]:
            parser.error(f"--reuse: {differing} differ from the earlier run")
        cost.optimisation, cost.seconds, cost.cpu = (earlier[key] for key in ("optimisation_seconds", "seconds", "cpu_seconds"))

    error = None
    try:
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), args.out / "quantized.onnx")
    except Exception:
        error = traceback.format_exc()[-1500:]
    if args.eval:
        names = {entry.name for entry in sim.session.get_inputs()}
        inputs = {name: x for name, x in np.load(args.eval).items() if name in names}
        n = len(next(iter(inputs.values())))
        logits = [sim.session.run(None, {name: x[i : i + 100] for name, x in inputs.items()})[0] for i in range(0, n, 100)]
        np.savez(args.out / "logits.npz", logits=np.concatenate(logits))
    write_result(
        args, cost, error, tool="aimet-onnx AdaRound", version=version("aimet-onnx"), weight_scheme=args.weight_scheme,
        activation_grid=f"per-tensor asymmetric unsigned, {args.activation_scheme}", applied=describe(sim),
        reused=str(args.reuse.name) if args.reuse else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
