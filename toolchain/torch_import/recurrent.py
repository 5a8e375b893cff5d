"""LSTM, GRU and RNN in either or both directions.

The usual cells run in torch's fused kernels, whose gates come in another order; every other variant is a loop over time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator

_Cell = Callable[..., tuple[torch.Tensor, ...]]
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_TORCH_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX: iofc, zrh; torch: ifco, rzh
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
    "Softsign": F.softsign,
    "Softplus": F.softplus,
}


@dataclass(frozen=True)
class _Settings:
    kind: str
    hidden: int
    directions: tuple[bool, ...]  # whether each runs backwards in time
    activations: tuple[tuple[str, ...], ...]  # of each direction
    clip: float
    linear_before_reset: bool
    input_forget: bool
    batch_first: bool

    @property
    def is_usual(self) -> bool:
        """Whether torch has a kernel for it (peepholes aside)."""
        names = set(self.activations)
        known = {_DEFAULTS[self.kind], *([("Relu",)] if self.kind == "RNN" else [])}
        return (
            len(names) == 1
            and names <= known
            and not self.clip
            and not self.input_forget
            and (self.kind != "GRU" or self.linear_before_reset)
        )


def recurrent(view: NodeView) -> Operator:
    """LSTM, GRU or RNN of every variant but activations with parameters."""
    settings = _settings(view)
    fixed = view.constant(4)
    usual = settings.is_usual and not view.has(7)

    def call(
        x: torch.Tensor,
        w: torch.Tensor,
        r: torch.Tensor,
        b: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        h0: torch.Tensor | None = None,
        c0: torch.Tensor | None = None,
        peepholes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if settings.batch_first:
            x = x.transpose(0, 1)
            h0, c0 = (state.transpose(0, 1) if state is not None else None for state in (h0, c0))
        count = len(settings.directions)
        zeros = x.new_zeros((count, x.shape[1], settings.hidden))
        states = [zeros if state is None else state for state in ((h0, c0) if settings.kind == "LSTM" else (h0,))]
        b = x.new_zeros((count, 2 * _GATES[settings.kind] * settings.hidden)) if b is None else b
        results = []
        if fixed is not None and (fixed == len(x)).all():
            lengths = None
        for i, backwards in enumerate(settings.directions):
            sequence = _reversed(x, lengths) if backwards else x
            initial = [state[i] for state in states]
            if usual and lengths is None:
                y, *last = _fused(settings, sequence, w[i], r[i], b[i], initial)
            else:
                cell = _cell(settings, i, w[i], r[i], b[i], peepholes[i] if peepholes is not None else None)
                y, *last = _loop(cell, sequence, initial, lengths)
            results.append((_reversed(y, lengths) if backwards else y, *last))
        y, *last = (torch.stack(parts, dim=1 if n == 0 else 0) for n, parts in enumerate(zip(*results, strict=True)))
        if settings.batch_first:
            return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
        return y, *last

    return Operator(call, view.inputs)


def _settings(view: NodeView) -> _Settings:
    kind, attrs = view.proto.op_type, view.attrs
    direction = attrs.get("direction", "forward")
    directions = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    size = len(_DEFAULTS[kind])
    given = [name.decode() for name in attrs.get("activations", [])]
    names = given or [*_DEFAULTS[kind]] * len(directions)
    unknown = [name for name in names if name not in _FUNCTIONS]
    if unknown or attrs.get("activation_alpha") or attrs.get("activation_beta"):
        view.refuse(f"activation {(unknown or names)[0]!r} with parameters is not supported")
    hidden = attrs.get("hidden_size")
    if hidden is None:
        shape = view.shape(2)
        hidden = shape[-1] if shape else None
    if hidden is None:
        view.refuse("its hidden size is not known")
    return _Settings(
        kind,
        hidden,
        directions,
        tuple(tuple(names[i * size : (i + 1) * size]) for i in range(len(directions))),
        attrs.get("clip", 0.0),
        bool(attrs.get("linear_before_reset", 0)),
        bool(attrs.get("input_forget", 0)),
        bool(attrs.get("layout", 0)),
    )


def _fused(
    settings: _Settings, x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor, initial: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """One direction in torch's kernel: ([steps, N, hidden], last state, ...)."""
    order = _TORCH_ORDER[settings.kind]

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        gates = tensor.chunk(len(order))
        return torch.cat([gates[i] for i in order]).contiguous()

    parameters = [ordered(w), ordered(r), *(ordered(part) for part in b.chunk(2))]
    state = [s.unsqueeze(0).contiguous() for s in initial]
    # Biases, one layer, no dropout, in training mode where gradients are wanted: cuDNN has none of them otherwise.
    options = (parameters, True, 1, 0.0, torch.is_grad_enabled(), False, False)
    if settings.kind == "LSTM":
        y, h, c = torch.lstm(x, state, *options)
        return y, h[0], c[0]
    function = {"GRU": torch.gru, "Tanh": torch.rnn_tanh, "Relu": torch.rnn_relu}[
        "GRU" if settings.kind == "GRU" else settings.activations[0][0]
    ]
    y, h = function(x, state[0], *options)
    return y, h[0]


def _loop(cell: _Cell, x: torch.Tensor, state: Sequence[torch.Tensor], lengths: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """One direction step by step; a sequence that has ended keeps its state and gives zeros."""
    outputs = []
    for time, step in enumerate(x):
        new = cell(step, *state)
        if lengths is None:
            state = new
            outputs.append(new[0])
        else:
            runs = (time < lengths).unsqueeze(1)
            state = [torch.where(runs, after, before) for after, before in zip(new, state, strict=True)]
            outputs.append(torch.where(runs, new[0], torch.zeros_like(new[0])))
    return torch.stack(outputs), *state


def _reversed(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Sequences [steps, N, ...] backwards in time, each within its length."""
    if lengths is None:
        return x.flip(0)
    time = torch.arange(len(x), device=x.device).unsqueeze(1)
    order = torch.where(time < lengths, lengths - 1 - time, time)
    return x.gather(0, order.unsqueeze(2).expand(x.shape))


def _cell(settings: _Settings, direction: int, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor, peepholes: torch.Tensor | None) -> _Cell:
    """One time step of one direction, as ONNX writes it."""
    functions = [_FUNCTIONS[name] for name in settings.activations[direction]]
    w_bias, r_bias = b.chunk(2)

    def clipped(t: torch.Tensor) -> torch.Tensor:
        return t.clamp(-settings.clip, settings.clip) if settings.clip else t

    def rnn(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (functions[0](clipped(F.linear(x, w, w_bias) + F.linear(h, r, r_bias))),)

    def gru(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f, g = functions
        size = settings.hidden
        gates = F.linear(x, w, w_bias)
        z, reset = f(clipped(gates[:, : 2 * size] + F.linear(h, r[: 2 * size], r_bias[: 2 * size]))).chunk(2, dim=1)
        if settings.linear_before_reset:
            inner = reset * F.linear(h, r[2 * size :], r_bias[2 * size :])
        else:
            inner = F.linear(reset * h, r[2 * size :], r_bias[2 * size :])
        new = g(clipped(gates[:, 2 * size :] + inner))
        return ((1 - z) * new + z * h,)

    def lstm(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f, g, last = functions
        i, o, forget, new = (F.linear(x, w, w_bias) + F.linear(h, r, r_bias)).chunk(4, dim=1)
        p_i, p_o, p_f = peepholes.chunk(3) if peepholes is not None else (0, 0, 0)
        i = f(clipped(i + p_i * c))
        forget = 1 - i if settings.input_forget else f(clipped(forget + p_f * c))
        c = forget * c + i * g(clipped(new))
        o = f(clipped(o + p_o * c))
        return o * last(c), c

    return {"RNN": rnn, "GRU": gru, "LSTM": lstm}[settings.kind]


CONVERTERS: dict[str, Converter] = dict.fromkeys(_GATES, recurrent)
