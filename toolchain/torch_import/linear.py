"""Products of matrices on tensors in their ONNX layout."""

import torch

from .operator import Converter, NodeView, Operator


def gemm(view: NodeView) -> Operator:
    """Y = alpha * A' B' + beta * C, with A' and B' transposed as the attributes say."""
    attrs = view.attrs
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    trans_a, trans_b = attrs.get("transA", 0), attrs.get("transB", 0)

    def call(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        left, right = a.t() if trans_a else a, b.t() if trans_b else b
        if c is None:
            return alpha * (left @ right) if alpha != 1.0 else left @ right
        return torch.addmm(c, left, right, beta=beta, alpha=alpha)

    return Operator(call, view.inputs, narrows=True)


def matmul(view: NodeView) -> Operator:
    """MatMul with NumPy's broadcasting, which is torch's."""
    return Operator(torch.matmul, view.inputs, narrows=True)


def einsum(view: NodeView) -> Operator:
    """Einsum; torch reads the same equations."""
    equation = view.attrs["equation"]
    return Operator(lambda *tensors: torch.einsum(equation, *tensors), view.inputs)


CONVERTERS: dict[str, Converter] = {"Gemm": gemm, "MatMul": matmul, "Einsum": einsum}
