"""The rules of a target as data: kinds of grids, operators that run on integers, how codes travel. `placement.py` applies them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

FLOAT_BITS = 32  # "bits" of activations that are not quantized
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_BIASES = {"int32": "int32", "steps": "float, in int32 steps,", "float": "float"}
# Results whose range is known before any sample: (lowest, highest) with highest just off the grid, so that the scale is a power of two. A
# Softmax over many classes fills little of its range, so that only targets which ask for it fix it (`Scheme.known_ranges`).
KNOWN_RANGES: Mapping[str, tuple[float, float]] = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 256 / 255),  # which reaches 1: the highest of 8-bit codes stands for it
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


@dataclass(frozen=True)
class Scheme:
    """What a runtime executes best: learning and export both follow it.

    Attributes:
        name: of the target.
        why: its rules and their reasons, in words.
        weight_symmetric: weights around zero (no zero point).
        activation_symmetric: activations signed and around zero, else unsigned with a zero point.
        per_channel: operators whose weights have a scale for each output channel; the others have one for the tensor.
        elementwise: operators besides the weighted ones that run on integers where a quantized operator reads them.
        fused_gates: a value times its own sigmoid (SiLU, hard swish) is computed behind the layer in front, with nothing on a grid.
        shortcut_only: of an Add's two inputs, one that comes straight from a convolution stays float, so that the runtime adds inside it.
        known_ranges: operators whose results have the range that is known without samples (`KNOWN_RANGES`).
        results: which results are quantized even though nothing on integers reads them: those of `convolutions`, `all`, or `none`.
        shared_concat: all inputs of a Concat and its output have one grid.
        bias: `int32` codes of scale s_x * s_w; `steps`, floats that are whole steps of it, so that a runtime which rounds them to int32
            changes nothing; or `float`, as they are.
        saturation: a grid narrower than its integer type is held by a Clip on the `integer`s behind QuantizeLinear, into which Relu and
            Clip are folded, or on the `float`s in front of it.
        rescales: a copy of a quantized value on another grid is made by an Add of zero, which runs as one integer kernel.
        kernels: what ONNX Runtime's integer kernels do not take as it is has an equal form that they do (`repeats`, `exporters.fusions`).
        storage: `fast` (8-bit integers, which integer kernels read) or `small` (weights packed into int4 or int2); the target's preference.
        reduce_range: 8-bit weights that meet 8-bit activations have 7 bits, for x86 CPUs without VNNI.
        pairs: instead, their neighbours add up to what those CPUs take without saturation (`saturation`): the runtime is ONNX Runtime.
        float8: what may be in E4M3: `all`, `weights` beside float activations, or `none`.
        whole_blocks: blocks of weights must fill the axis that they cut; weights where they do not have one scale for each channel.
        packed_blocks: blocks are of weights of 4 bits at most, and only these are packed.
        stores: weights that no integer kernel reads (tables, recurrent layers, control flow, islands) are codes in the file all the same.
        elsewhere: the file is for another runtime, so that ONNX Runtime's integer kernels and their time say nothing of it.
    """

    name: str
    why: str
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    per_channel: frozenset[str] = WEIGHTED
    elementwise: frozenset[str] = frozenset()
    fused_gates: bool = False
    shortcut_only: bool = False
    known_ranges: frozenset[str] = frozenset({"Sigmoid", "HardSigmoid", "Tanh"})
    results: str = "none"
    shared_concat: bool = False
    bias: str = "steps"
    saturation: str = "float"
    rescales: bool = False
    kernels: bool = False
    storage: str = "fast"
    reduce_range: bool = False
    pairs: bool = False
    float8: str = "none"
    whole_blocks: bool = False
    packed_blocks: bool = False
    stores: bool = False
    elsewhere: bool = False

    @property
    def convention(self) -> str:
        """The rules in one sentence, and which of them were set by hand."""
        text = (
            f"{self.name}: {_kind(self.weight_symmetric)} weights, {_channels(self.per_channel)}; {_kind(self.activation_symmetric)} "
            f"per-tensor activations behind their Relu/Clip; {self._addends}; {_BIASES[self.bias]} biases; "
            f"{'quantized' if self.results == 'all' else 'float'} graph outputs; {self.storage} storage"
        )
        preset = TARGETS.get(self.name)
        asked = [
            f"{what} {_kind(own)} as asked (the target: {_kind(theirs)})"
            for what, own, theirs in (
                ("weights", self.weight_symmetric, preset.weight_symmetric if preset else self.weight_symmetric),
                ("activations", self.activation_symmetric, preset.activation_symmetric if preset else self.activation_symmetric),
            )
            if own != theirs
        ]
        return "; ".join([text, *asked])

    @property
    def _addends(self) -> str:
        if "Add" not in self.elementwise:
            return "addends float"
        return "the shortcut addend quantized, a convolution's float" if self.shortcut_only else "both addends quantized"

    def differences(self, other: "Scheme") -> tuple[str, ...]:
        """What another scheme does differently, as `rule: own -> other`."""
        names = ("weight_symmetric", "activation_symmetric", "shortcut_only", "results", "shared_concat", "bias", "reduce_range")
        names = (*names, "pairs", "stores", "fused_gates")
        found = [
            f"{name.replace('_', ' ')}: {getattr(self, name)} -> {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        for name in ("per_channel", "elementwise", "known_ranges"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                found.append(f"{name.replace('_', ' ')}: {_changes(own, theirs)}")
        return tuple(found)


_QLINEAR = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Concat"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})

TARGETS: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "ort-cpu",
            "QLinear kernels take int8 weights around zero per channel, uint8 activations with a zero point and int32 biases, and fuse "
            "only where a convolution's result is quantized behind its activation; a Clip on the integers keeps them fused. CPUs without "
            "VNNI saturate pairs of 8-bit products, hence steps of weights on which no pair gets there. Softmax stays float: an encoder "
            "takes 1.05 to 1.6 times as long with its integer kernel, which sums in 32 bits and makes zeros of rows of one.",
            elementwise=_QLINEAR | {"HardSigmoid"},
            results="convolutions",
            bias="int32",
            saturation="integer",
            rescales=True,
            kernels=True,
            reduce_range=True,
            pairs=True,
            stores=True,
            float8="weights",
        ),
        Scheme(
            "ort-cuda",
            "ONNX Runtime's CUDA provider has no integer convolutions: everything runs in float, so only operands are quantized and "
            "weights are packed: it saves file size, not time (weights are dequantized at each run, unless the session option "
            "session.disable_quant_qdq=1 lets them be folded). Biases are int32, since ONNX Runtime would round float ones to int32 "
            "steps by itself, which at few bits moves results.",
            bias="int32",
            saturation="integer",
            storage="small",
            stores=True,
            float8="weights",
        ),
        Scheme(
            "tensorrt",
            "The parser takes zero points of 0 only and no int32 DequantizeLinear, and reads uint8 as int8. Of a residual sum only the "
            "shortcut is quantized, so that the convolution adds it in its epilogue. Grids below 8 bits travel in int8; int4 is for the "
            "blocks of matrix products, and blocks are of int4 alone.",
            activation_symmetric=True,
            elementwise=_POOLS | {"Add"},
            shortcut_only=True,
            float8="all",
            whole_blocks=True,
            packed_blocks=True,
            elsewhere=True,
        ),
        Scheme(
            "openvino",
            "QuantizeLinear becomes FakeQuantize, which the low-precision passes turn into u8 activations and i8 weights around zero, with "
            "float biases; a Clip in front of it runs in the convolution's epilogue. A residual sum runs there too, where the rounding of "
            "the convolution's own result is left out, so only the shortcut is quantized, and SiLU and hard swish do, with nothing inside "
            "on a grid; what a Concat joins is put on one grid, so it has one from the start. What is learned is then what runs, bit for "
            "bit.",
            elementwise=_POOLS | {"Add", "Mul", "Concat"},
            fused_gates=True,
            shortcut_only=True,
            shared_concat=True,
            reduce_range=True,
            float8="weights",
            whole_blocks=True,
            elsewhere=True,
        ),
        Scheme(
            "qnn",
            "The HTP runs fixed-point graphs: every activation is quantized, graph outputs too, Sigmoid, Softmax and Tanh with their known "
            "ranges and Concat on one grid; weights are around zero, per channel for convolutions only; biases are int32.",
            per_channel=frozenset({"Conv", "ConvTranspose"}),
            elementwise=_QLINEAR,
            known_ranges=frozenset(KNOWN_RANGES),
            results="all",
            shared_concat=True,
            bias="int32",
            elsewhere=True,
        ),
        Scheme(
            "academic",
            "What BRECQ, QDrop and MRECG report (MQBench's Academic backend): weights and activations with zero points, only what weighted "
            "operators read is quantized, addends and biases stay float. For comparing with papers, not for deployment.",
            weight_symmetric=False,
            bias="float",
            float8="weights",
        ),
        Scheme(
            "portable",
            "The common ground of ONNX Runtime, TensorRT and OpenVINO: int8 around zero everywhere, float biases, of a residual sum only "
            "the shortcut quantized, no integer Clip, 8-bit types of opset 13. A bit of every activation behind a Relu is lost, and "
            "OpenVINO moves grids around zero at a Concat (its own target is exact there).",
            activation_symmetric=True,
            elementwise=_POOLS | {"Add"},
            shortcut_only=True,
            reduce_range=True,
        ),
    )
}
ORT_CPU = TARGETS["ort-cpu"]


def scheme_for(target: str, weight_scheme: str | None, activation_scheme: str | None, storage: str | None = None) -> Scheme:
    """A target's rules, with the kinds of grids and the storage that were asked for by hand."""
    preset = TARGETS[target]
    around_zero = preset.activation_symmetric if activation_scheme is None else activation_scheme == "symmetric"
    return replace(
        preset,
        weight_symmetric=preset.weight_symmetric if weight_scheme is None else weight_scheme == "symmetric",
        activation_symmetric=around_zero,
        # A HardSigmoid on integers is the saturation at both ends of a grid from 0 to 1.
        elementwise=preset.elementwise - {"HardSigmoid"} if around_zero else preset.elementwise,
        storage=storage or preset.storage,
    )


def refusal(scheme: Scheme, precision: "Precision") -> str | None:
    """Why a target cannot take a format, and what to do instead; None where it can."""
    name, bits, block = scheme.name, precision.activation_bits, precision.block_size
    if precision.float8:
        return _float8_refusal(scheme, precision)
    if 16 in (bits, precision.elementwise) and name in ("tensorrt", "portable"):
        return f"{name} has no 16-bit integers: use --activation-bits 8, or --target ort-cpu or qnn"
    if 16 in (bits, precision.elementwise) and name == "openvino":
        return (
            "OpenVINO takes 16-bit quantizers out of the graph and computes something else: use --activation-bits 8, or 32 for float "
            "activations"
        )
    if scheme.storage == "small" and name == "portable":
        return "packed weights need opset 21, which portable files avoid: use --storage fast"
    if scheme.storage == "small" and name == "tensorrt" and (bits < FLOAT_BITS or block is None):
        return (
            "TensorRT takes int4 for block-wise weights beside float activations only: use --storage fast, or --activation-bits 32 with "
            "--block-size 64"
        )
    if scheme.packed_blocks and block is not None and (scheme.storage != "small" or precision.weight_bits > 4):
        return "TensorRT takes blocks of int4 weights only: add --weight-bits 4 --storage small, or leave --block-size out"
    if block is not None and name == "portable":
        return "portable has no block-wise DequantizeLinear: leave --block-size out, or use another --target"
    if block is not None and name == "qnn":
        return "the HTP takes block-wise weights beside 16-bit activations only, and --block-size is for float ones: leave it out"
    if block is not None and bits < FLOAT_BITS:
        return "--block-size is for weights beside float activations: integer kernels have one scale per channel; add --activation-bits 32"
    if not scheme.weight_symmetric and name in ("tensorrt", "qnn", "portable"):
        return f"{name} takes weights around zero only: leave --weight-scheme out"
    if not scheme.activation_symmetric and name in ("tensorrt", "portable"):
        return f"{name} takes activations around zero only: leave --activation-scheme out"
    if bits == FLOAT_BITS and name == "qnn":
        return "the HTP runs fixed-point graphs: use --activation-bits 8 or 16, or another --target"
    return None


def _float8_refusal(scheme: Scheme, precision: "Precision") -> str | None:
    if precision.weight_bits != 8 or precision.activation_bits not in (8, FLOAT_BITS) or precision.elementwise_bits != 8:
        return "--number-format fp8 has 8 bits: add --weight-bits 8 --activation-bits 8 (or 32 for weights only), or use --precision fp8"
    if precision.block_size is not None:
        return "no runtime reads block-wise fp8: leave --block-size out"
    if scheme.float8 == "none":
        return f"{scheme.name} has no fp8: use --precision w8a8, or another --target"
    if scheme.float8 == "weights" and precision.activation_bits < FLOAT_BITS:
        why = (
            "OpenVINO rounds fp8 activations otherwise than the file says"
            if scheme.name == "openvino"
            else "ONNX Runtime fuses fp8 operands into integer kernels that do not exist, so that the file would not load"
        )
        return f"{why}: use --activation-bits 32 for fp8 weights only, or --target tensorrt"
    return None


@dataclass(frozen=True)
class Precision:
    """Bit widths; `elementwise_bits` and `first_last_bits` never fall below the general ones. `first_last_bits` None: the same.

    `reduce_range` gives 8-bit weights that meet 8-bit activations 7 bits. x86 CPUs without VNNI add pairs of such products in 16 bits:
    2 x 255 x 128 saturates there, silently, and 2 x 255 x 64 does not. With `pairs` they have 8 bits, but no such pair. `block_size` cuts
    the weights of matrix products into blocks. `requantizes`: a value that element-wise operators read too keeps `elementwise_bits`, and
    layers read a copy on their own grid; else all read it on the grid of the layers. `float8`: E4M3 in place of 8-bit integers.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    elementwise_bits: int = 8
    first_last_bits: int | None = 8
    reduce_range: bool = True
    pairs: bool = False
    block_size: int | None = None
    requantizes: bool = True
    float8: bool = False

    def weight(self, edge: bool) -> int:
        bits = max(self.weight_bits, self.first_last_bits or 0) if edge else self.weight_bits
        return 7 if self._reduces(bits, edge) and not self.pairs else bits

    def is_paired(self, edge: bool) -> bool:
        """Whether the neighbours among a layer's 8-bit weights must not add up to what saturates."""
        return self.pairs and self._reduces(self.weight(edge), edge)

    def _reduces(self, bits: int, edge: bool) -> bool:
        return self.reduce_range and not self.float8 and bits == self.operand(edge) == 8

    @property
    def stored(self) -> int:
        """Bits of weights that are only stored: those of the first and last layers, which a table in front of the network is."""
        return max(self.weight_bits, self.first_last_bits or 0)

    def operand(self, edge: bool) -> int:
        """Bits of what a weighted operator reads; `FLOAT_BITS` where activations stay float."""
        return max(self.activation_bits, self.first_last_bits or 0) if edge else self.activation_bits

    @property
    def elementwise(self) -> int:
        return max(self.elementwise_bits, self.activation_bits)

    @property
    def convention(self) -> str:
        if self.float8:
            return f"weights in E4M3, {'activations float' if self.activation_bits == FLOAT_BITS else 'activations too'}"
        ending = ""
        if self.is_paired(edge=True):
            ending = "; where both have 8, steps of weights on which no pair of products saturates (exact on every CPU)"
        elif self.weight(edge=True) == 7 and max(self.weight_bits, self.first_last_bits or 0) == 8:
            ending = "; weights of 7 bits where both would have 8 (reduced range, exact on every CPU)"
        if self.activation_bits == FLOAT_BITS:
            edge = "" if self.first_last_bits is None else f", those of the first and last layers of {self.first_last_bits}"
            blocks = f", in blocks of {self.block_size} for matrix products" if self.block_size is not None else ""
            return f"weights of {self.weight_bits} bits{edge}{blocks}; activations float"
        if self.first_last_bits is None:
            return f"all weighted layers W{self.weight_bits}A{self.activation_bits}{ending}"
        return (
            f"first and last weighted layers and what they read at {self.first_last_bits} bits, the first layer's output at "
            f"{self.activation_bits} (the QDrop / MQBench convention){ending}"
        )


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _channels(operators: frozenset[str]) -> str:
    return "per channel" if operators == WEIGHTED else f"per channel for {' and '.join(sorted(operators))}, else per tensor"


def _changes(own: frozenset[str], theirs: frozenset[str]) -> str:
    parts = [
        f"without {', '.join(sorted(own - theirs))}" if own - theirs else "",
        f"with {', '.join(sorted(theirs - own))}" if theirs - own else "",
    ]
    return " and ".join(part for part in parts if part)
