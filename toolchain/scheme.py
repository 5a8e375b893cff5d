"""The rules of a target as data: kinds of grids, bit widths, operators that run on integers. `placement.py` applies them to a graph."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """What a target wants: kinds of grids, and the operators besides the weighted ones that it runs on integers."""

    name: str
    weight_symmetric: bool
    activation_symmetric: bool
    elementwise: frozenset[str]

    @property
    def convention(self) -> str:
        return (
            f"{self.name}: {'symmetric' if self.weight_symmetric else 'asymmetric'} per-channel weights, "
            f"{'symmetric' if self.activation_symmetric else 'asymmetric'} per-tensor activations behind their Relu/Clip, addends "
            "quantized, int32 biases, float graph outputs"
        )


ORT_CPU_ELEMENTWISE = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Concat"})
ORT_CPU = Scheme("ort-cpu", weight_symmetric=True, activation_symmetric=False, elementwise=ORT_CPU_ELEMENTWISE)


@dataclass(frozen=True)
class Precision:
    """Bit widths; `elementwise_bits` and `first_last_bits` never fall below the general ones. `first_last_bits` None: the same.

    `reduce_range` gives 8-bit weights that meet 8-bit activations 7 bits. x86 CPUs without VNNI add pairs of such products in 16 bits:
    2 x 255 x 128 saturates there, silently, and 2 x 255 x 64 does not.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    elementwise_bits: int = 8
    first_last_bits: int | None = 8
    reduce_range: bool = True

    def weight(self, edge: bool) -> int:
        bits = max(self.weight_bits, self.first_last_bits or 0) if edge else self.weight_bits
        return 7 if self.reduce_range and bits == self.operand(edge) == 8 else bits

    def operand(self, edge: bool) -> int:
        return max(self.activation_bits, self.first_last_bits or 0) if edge else self.activation_bits

    @property
    def elementwise(self) -> int:
        return max(self.elementwise_bits, self.activation_bits)

    @property
    def convention(self) -> str:
        reduced = self.weight(edge=True) == 7 and max(self.weight_bits, self.first_last_bits or 0) == 8
        ending = "; weights of 7 bits where both would have 8 (reduced range, exact on every CPU)" if reduced else ""
        if self.first_last_bits is None:
            return f"all weighted layers W{self.weight_bits}A{self.activation_bits}{ending}"
        return (
            f"first and last weighted layers and what they read at {self.first_last_bits} bits, the first layer's output at "
            f"{self.activation_bits} (the QDrop / MQBench convention){ending}"
        )
