"""Everything that decides a result, and what was left open of it filled in."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UsageError
from .option import check, option
from .scheme import FLOAT_BITS, TARGETS, Precision, Scheme, refusal, scheme_for
from .settings import Settings

RANGES = ("minmax", "percentile", "mse")
ALGORITHMS = ("minmax", "mse", "aciq", "lapq", "adaround", "adaquant", "bit-split", "brecq", "qdrop")
LAYERWISE = ("adaround", "adaquant", "bit-split")  # these learn one layer at a time, the algorithms after them blocks
UNITS = ("none", "loss", "loss-normalised", "modcap", "transitions", "manual")
# Iterations per unit. `best` is what the papers use; the others trade steps for a proportionally larger step size.
PRESETS: Mapping[str, int] = {"fast": 250, "default": 1000, "best": 20000}
DEVICES = ("auto", "cuda", "cpu")
PAPER_ITERATIONS = 20000
_MAX_SPEEDUP = 100.0
BATCH, _LEAST_BATCH = 32, 4  # samples per iteration, as the papers have it, and where samples are large
_BATCH_FLOATS = 1 << 26  # of the largest value of a unit


@dataclass(frozen=True)
class Config:
    """Everything that decides a result. Field names with dashes are the flags and the keys of a configuration file."""

    weight_bits: int = option(4, "Bits of weights.", "precision", low=2, high=8)
    activation_bits: int = option(
        4, "Bits of what weighted operators read: 2-8, 16, or 32 for float.", "precision", choices=(2, 3, 4, 5, 6, 7, 8, 16, FLOAT_BITS)
    )
    first_last_bits: str = option(
        "8", "Bits of the first and last weighted layers and their inputs; `same` for no exception.", "precision", choices=("8", "same")
    )
    elementwise_bits: int = option(
        8, "Bits of activations that only element-wise operators read (addends).", "precision", choices=(2, 3, 4, 5, 6, 7, 8, 16)
    )
    requantize: bool = option(
        True,
        "Keep what element-wise operators and layers both read (a shortcut) in elementwise-bits and requantize it for the layers; off: one "
        "grid for all readers, as in the papers.",
        "precision",
    )
    reduce_range: bool | None = option(
        None,
        "Where weights and activations both have 8 bits, steps of weights on which products do not saturate on x86 CPUs without VNNI "
        "(weights of 7 bits for openvino and portable). Default: the target's.",
        "precision",
    )
    number_format: str = option(
        "int", "What 8-bit numbers are: int, or fp8 (E4M3, rounded to nearest only; --precision fp8).", "precision", choices=("int", "fp8")
    )
    target: str = option(
        "ort-cpu",
        "Runtime that the model is made for: decides what is quantized and how, while learning too.",
        "precision",
        choices=tuple(TARGETS),
    )
    storage: str | None = option(
        None,
        "How weights below 8 bits are stored: fast (int8, for integer kernels) or small (packed int4, int2). Default: the target's.",
        "precision",
        choices=("fast", "small"),
    )
    block_size: int | None = option(
        None,
        "Inputs that share a scale in the weights of MatMul and Gemm, which are per channel otherwise; goes with --activation-bits 32.",
        "precision",
        choices=(16, 32, 64, 128, 256),
    )
    weight_scheme: str | None = option(None, "Grid of weights. Default: the target's.", "precision", choices=("symmetric", "asymmetric"))
    activation_scheme: str | None = option(
        None, "Grid of activations. Default: the target's.", "precision", choices=("symmetric", "asymmetric")
    )
    bits: tuple[str, ...] = option(
        (),
        "Bits of some nodes, PATTERN=w8a8 with patterns as in --keep-float, at the edges too. Repeatable, later ones win.",
        "precision",
    )
    keep_float: tuple[str, ...] = option(
        (), "Keep nodes float: node name, operator type, or regular expression of node names. Repeatable.", "precision"
    )
    algorithm: str = option(
        "qdrop",
        "How rounding and step sizes are found. Ranges only, in seconds to minutes: minmax, mse, aciq, lapq; learned layer by layer: "
        "adaround, adaquant, bit-split; block by block: brecq, qdrop.",
        "method",
        choices=ALGORITHMS,
    )
    units: str = option(
        "loss",
        "Which neighbouring blocks are reconstructed jointly (MRECG): those where the `loss` drops or capacities (`modcap`) differ; "
        "`none`: each block alone.",
        "method",
        choices=UNITS,
    )
    preset: str = option("default", "Iterations per unit: fast 250, default 1000, best 20000.", "method", choices=tuple(PRESETS))
    iterations: int | None = option(None, "Iterations per unit; overrides the preset.", "method", low=1)
    batch_size: int | None = option(
        None,
        "Samples per iteration. Default: 32, and fewer, 4 at least, in units with values so large that an iteration would take seconds "
        "(images beyond some 500 pixels); their many positions make up for it.",
        "method",
        low=1,
    )
    seed: int = option(0, "Seed of every random choice.", "method", low=0)
    device: str = option("auto", "Where to reconstruct and validate.", "method", choices=DEVICES)
    compile: str = option(
        "auto",
        "Compile the arithmetic of quantizers that learn, with torch's compiler (on a CPU it takes one of C++); auto: where it saves more "
        "time than it takes.",
        "method",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: str = option(
        "auto",
        "On CUDA, capture the step of each unit as a graph that is replayed; auto: where that can be done.",
        "method",
        choices=("auto", "off"),
    )
    amp: str = option(
        "auto",
        "Automatic mixed precision: while units are learned, convolutions and matrix products are computed in bfloat16, all else in "
        "float32; auto: where quantizers are compiled, and the device has matrix units for it (Intel AMX, CUDA from capability 8.0).",
        "method",
        choices=("auto", "on", "off"),
    )
    memory_budget: str | None = option(
        None,
        "Host memory to aim at, as 8GB: cached activations beyond the estimate go to files in the run folder, and mini-batches that do "
        "not fit are learned from in parts. On CUDA activations are on the device first, as far as they fit.",
        "method",
    )
    cache_dtype: str = option(
        "float32",
        "How cached activations are kept that are on no grid (those on one are kept as its codes, which loses nothing): the short types "
        "halve them, and the learned result changes a little.",
        "method",
        choices=("float32", "bfloat16", "float16"),
    )
    calibration_samples: int = option(1024, "Most calibration samples to use.", "data", low=1)
    weight_range: str = option("mse", "Calibration of weight ranges.", "calibration", choices=RANGES)
    activation_range: str = option(
        "auto",
        "Calibration of activation ranges; auto tries mse in four norms, percentile and minmax, and takes for each bit width what harms "
        "the model's outputs least. The papers have mse.",
        "calibration",
        choices=("auto", *RANGES),
    )
    percentile: float = option(99.99, "Percentile of the `percentile` calibration.", "calibration", low=50.0, high=100.0)
    bias_correction: bool = option(
        True, "With `minmax` and `mse`: take the shift of each channel's mean out of the biases; off: the papers' baseline.", "calibration"
    )
    range_samples: int = option(256, "Samples that activation ranges are taken from.", "calibration", low=1)
    selector: str = option(
        "auto",
        "How merges are chosen from the metric: signed-drop (default for loss), topk (Eq. 4; default for modcap).",
        "units",
        choices=("auto", "signed-drop", "topk"),
    )
    merge: tuple[str, ...] = option((), "With `--units manual`: blocks to join, as `b02+b03`. Repeatable.", "units")
    boundary: tuple[str, ...] = option((), "End a block behind this value (an ONNX value name). Repeatable.", "units")
    merge_count: int | None = option(
        None, "Number of boundaries to merge (the paper's k); default: signed-drop by tolerance, topk one for each stage.", "units", low=0
    )
    merge_tolerance: float = option(0.05, "Smallest relative drop of the loss that is merged.", "units", low=0.0)
    merge_penalty: float = option(float("inf"), "The paper's lambda of Eq. 4, for topk; inf takes exactly k.", "units", low=0.0)
    max_group: int = option(3, "Most blocks in one unit.", "units", low=1)
    cross_stage: bool = option(True, "Allow merges where a stage opens.", "units")
    capacity_alpha: float = option(4.0, "Factor on the capacity of stage-opening blocks in `modcap`.", "units", low=0.0)
    weight_lr: float | None = option(
        None, "Learning rate of the rounding logits; default 1e-3 at 20000 iterations.", "reconstruction", low=0.0
    )
    activation_lr: float | None = option(
        None, "Learning rate of the activation steps, as a share of each; default 1e-4 at 20000 iterations.", "reconstruction", low=0.0
    )
    weight_step_lr: float | None = option(
        None,
        "Learning rate of the steps of weights, as a share of each channel's; default 1e-4 at 20000 iterations with brecq and qdrop; "
        "0, as in the papers: they stay.",
        "reconstruction",
        low=0.0,
    )
    bias_lr: float | None = option(
        None,
        "Learning rate of the biases, as a share of each channel's magnitude; default 1e-5 at 20000 iterations with brecq and qdrop; "
        "0, as in the papers: they stay.",
        "reconstruction",
        low=0.0,
    )
    keep_probability: float | None = option(
        None,
        "Chance that an activation element is quantized while learning; default qdrop 0.5, else 1.",
        "reconstruction",
        low=0.0,
        high=1.0,
    )
    round_weight: float | None = option(
        None,
        "Weight of the rounding regulariser (lambda); default 0.1 in units with depthwise convolutions, else 0.01.",
        "reconstruction",
        low=0.0,
    )
    warmup: float = option(0.2, "Share of the iterations before the rounding regulariser sets in.", "reconstruction", low=0.0, high=1.0)
    beta_start: float = option(20.0, "First exponent of the rounding regulariser.", "reconstruction", low=1.0)
    beta_end: float = option(2.0, "Last exponent of the rounding regulariser.", "reconstruction", low=1.0)
    early_stop: float | None = option(
        None,
        "End a unit once this share of its roundings is decided, looked at 40 times in its iterations; the rest is rounded as it tends. "
        "Default: never.",
        "reconstruction",
        low=0.5,
        high=1.0,
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check(spec, getattr(self, spec.name))
        _ = self.own_bits  # refuse bad spellings early
        if self.units == "manual" and not self.merge:
            raise UsageError("--units manual needs at least one --merge, such as --merge b02+b03 (see `inspect` for the block names)")
        if self.merge and self.units != "manual":
            raise UsageError("--merge only goes with --units manual")
        _ = self.memory  # refuse bad spellings early
        if self.precision.float8 and self.bits:
            raise UsageError("--bits: gives nodes integers of their own, beside which fp8 does not load: leave it out, or use --keep-float")
        for precision in (self.precision, *(own for _, own in self.own_bits)):
            refused = refusal(self.scheme, precision)
            if refused is not None:
                raise UsageError(refused)
        if self.precision.float8 and self.algorithm not in ("minmax", "mse"):
            raise UsageError(f"--algorithm {self.algorithm}: finds integer grids; fp8 is rounded to nearest: use --algorithm mse or minmax")
        if self.algorithm == "bit-split" and not self.scheme.weight_symmetric:
            raise UsageError("--algorithm bit-split: splits codes around zero into bits; add --weight-scheme symmetric")

    @property
    def scheme(self) -> Scheme:
        return scheme_for(self.target, self.weight_scheme, self.activation_scheme, self.storage)

    @property
    def precision(self) -> Precision:
        first_last = None if self.first_last_bits == "same" else int(self.first_last_bits)
        reduce_range = self.scheme.reduce_range if self.reduce_range is None else self.reduce_range
        return Precision(
            self.weight_bits,
            self.activation_bits,
            self.elementwise_bits,
            first_last,
            reduce_range,
            self.scheme.pairs and self.scheme.weight_symmetric,
            self.block_size,
            self.requantize,
            float8=self.number_format == "fp8",
        )

    @property
    def own_bits(self) -> tuple[tuple[str, Precision], ...]:
        """The patterns of `bits` with the precision of the nodes that match: theirs wherever they are, no exception at the edges."""
        return tuple(self._own_bits(entry) for entry in self.bits)

    def _own_bits(self, entry: str) -> tuple[str, Precision]:
        pattern, _, text = entry.rpartition("=")
        found = re.fullmatch(r"[wW](\d+)[aA](\d+)", text.strip())
        weight, activation = (int(found[1]), int(found[2])) if found else (0, 0)
        if not pattern or not 2 <= weight <= 8 or activation not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise UsageError(f"--bits {entry!r}: expected PATTERN=w<bits>a<bits> with weights of 2-8 and activations of 2-8 or 16 bits")
        return pattern, dataclasses.replace(self.precision, weight_bits=weight, activation_bits=activation, first_last_bits=None)

    @property
    def label(self) -> str:
        """The precision as it is written on the command line; fp8 weights beside float activations are `fp8a32`."""
        if self.number_format == "fp8":
            return "fp8" if self.activation_bits == 8 else f"fp8a{self.activation_bits}"
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def learns(self) -> bool:
        return self.algorithm in (*LAYERWISE, "brecq", "qdrop")

    @property
    def draws(self) -> bool:
        """Whether it learns from mini-batches; bit-split solves for all samples at once."""
        return self.learns and self.algorithm != "bit-split"

    @property
    def chooses_ranges(self) -> bool:
        """Whether activation ranges are chosen by what they do to the outputs; some algorithms have their own."""
        return self.activation_range == "auto" and self.algorithm not in ("minmax", "aciq", "lapq")

    @property
    def unit_selector(self) -> str:
        """How merges are chosen, with `auto` filled in."""
        return self.selector if self.selector != "auto" else ("topk" if self.units == "modcap" else "signed-drop")

    @property
    def most_blocks(self) -> int:
        """Most blocks in one unit; the published ModCap grouping has pairs only."""
        return 2 if self.units == "modcap" and self.unit_selector == "topk" else self.max_group

    @property
    def memory(self) -> int | None:
        """The memory budget in bytes."""
        if self.memory_budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", self.memory_budget.strip())
        if match is None:
            raise UsageError(f"--memory-budget {self.memory_budget}: expected a size such as 8GB, 1.5GiB or 800MB")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))

    @property
    def unit_iterations(self) -> int:
        return self.iterations if self.iterations is not None else PRESETS[self.preset]

    def batch(self, largest: int) -> int:
        """Samples per iteration in a unit whose largest value has so many floats for each."""
        if self.batch_size is not None:
            return self.batch_size
        fitting = max(_BATCH_FLOATS // max(largest, 1), 1)
        return min(max(1 << fitting.bit_length() - 1, _LEAST_BATCH), BATCH)  # a power of two

    def settings(self, has_depthwise: bool, largest: int = 1) -> Settings:
        """The hyper-parameters for a unit, with what was left open filled in.

        `has_depthwise`: whether it has a depthwise convolution; `largest`: floats of its largest value for each sample.
        Fewer iterations than the papers' take proportionally larger steps: Adam moves a parameter by about its learning
        rate per step, so that the distance it can cover stays. Down to 250 iterations this beat smaller rates on held-out samples.
        """
        speedup = min(max(PAPER_ITERATIONS / self.unit_iterations, 1.0), _MAX_SPEEDUP)
        by_block = self.algorithm in ("brecq", "qdrop")
        learns_steps = by_block or self.algorithm == "adaquant"
        # AdaQuant moves weights in steps of their grids, which are no logits; its rates had the least sum of layer losses on ResNet-20.
        weight_rate, step_rate = (4e-3, 2.5e-5) if self.algorithm == "adaquant" else (1e-3, 1e-4)
        activation_lr = self.activation_lr if self.activation_lr is not None else step_rate * speedup
        return Settings(
            iterations=self.unit_iterations,
            batch_size=self.batch(largest),
            weight_lr=self.weight_lr if self.weight_lr is not None else weight_rate * speedup,
            activation_lr=activation_lr if learns_steps else 0.0,
            weight_step_lr=self.weight_step_lr if self.weight_step_lr is not None else (1e-4 * speedup if by_block else 0.0),
            bias_lr=self.bias_lr if self.bias_lr is not None else (1e-5 * speedup if by_block else 0.0),
            keep_probability=self.keep_probability if self.keep_probability is not None else (0.5 if self.algorithm == "qdrop" else 1.0),
            round_weight=self.round_weight if self.round_weight is not None else (0.1 if has_depthwise else 0.01),
            warmup=self.warmup,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            early_stop=self.early_stop,
        )
