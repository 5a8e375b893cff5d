"""The optimisation of one unit against its float output: rounding (AdaRound), steps (LSQ, GENIE-M) and biases (BRECQ, QDrop)."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from . import recording
from .activations import Value, constants_of
from .bias_learning import LearnedBiases
from .fake_quant import Coins
from .losses import loss_of
from .minibatch import Batch, Draw, Selection
from .quant_table import QuantTable
from .recording import Recorded
from .rounding_learning import LearnedRounding
from .settings import Settings
from .step_learning import LearnedSteps, LearnedWeightSteps, anneal
from .unit import NOT_FINITE, CurvePoint, Learned, Unit, UnitResult, are_finite, is_curve_point, learned_unit

_SMALLEST_FACTOR = 0.01  # of the calibrated step: Adam must not carry a step through zero

T = TypeVar("T")
Recorder = Callable[[Callable[[], T]], Callable[[], T]]


def reconstruct_unit(unit: Unit) -> tuple[UnitResult, dict[str, Value]]:
    """Learn the rounding of a unit's weights, its biases and the steps of the activations it makes.

    Raises:
        NotCapturedError: the unit is one to be recorded, and the device cannot.
    """
    unit = unit.aiming_at(unit.piece.block.learned_outputs)
    return learned_unit(unit, lambda before: _learn(unit, before))


def _learn(unit: Unit, before: QuantTable) -> Learned:
    settings, draw = unit.settings, unit.draw()
    is_recorded = unit.is_recorded and draw.is_steady
    step = _Step(unit, draw, is_recorded)
    curve: list[CurvePoint] = []
    with _recorder(draw, is_recorded) as recorded:
        differentiated = recorded(step.differentiate)
        moved, moved_with_regulariser = recorded(lambda: step.move(False)), recorded(lambda: step.move(True))
        for iteration in range(settings.iterations):
            step.feed(draw.selections())
            loss, gradients = differentiated()
            draw.processes.sum([loss, *gradients])
            beta = _beta(iteration, settings)
            is_point = is_curve_point(iteration, settings.iterations)
            state = torch.stack([loss, *step.rounding.state(settings.round_weight, beta)]) if is_point else None
            step.schedule(iteration, beta)
            moved() if beta is None else moved_with_regulariser()
            if state is not None:
                value, regulariser, decided = state.tolist()  # the only wait for the device
                curve.append(CurvePoint(iteration, value, regulariser, math.nan if beta is None else beta, decided))
                unit.progress(iteration + 1, settings.iterations, value)
                if beta is not None and settings.early_stop is not None and decided >= settings.early_stop:
                    break  # a weight at one of its ends has no gradient: what is decided stays
    if not are_finite(step.parameters):
        return Learned(before, tuple(curve), None, NOT_FINITE)
    return Learned(unit.finish(step.learned(), step.biases.arrays()), tuple(curve), step.rounding.undecided())


class _Step:
    """One step of learning, in two parts of the device's work alone, between which processes sum gradients: `differentiate` and `move`.

    Where they are recorded, mini-batches are copied to where the first one is, and what changes from step to step are tensors.
    """

    def __init__(self, unit: Unit, draw: Draw, is_recorded: bool) -> None:
        piece, table, settings, device = unit.piece, unit.table, unit.settings, unit.device
        given = unit.given
        weights = {name: given[name] for name in unit.weights}
        self._table, self._settings, self._draw = table, settings, draw
        shapes = {name: weight.shape for name, weight in weights.items()}
        self._scales = LearnedWeightSteps(shapes if settings.weight_step_lr > 0 else {}, table, device)
        self.rounding = LearnedRounding(weights, table, device, self._scales if self._scales.factors else None)
        self._constants = constants_of(piece.weights, given, None, device)
        self.biases = LearnedBiases(unit.biases if settings.bias_lr > 0 else {}, unit.floats, table, device)
        made = [value for node in piece.block.nodes for value in node.outputs]
        self._steps = LearnedSteps(made, table, device, settings.activation_lr > 0, unit.scores)
        is_capturable = is_recorded and device.type == "cuda"
        self._of_weights = torch.optim.Adam([self.rounding.logits], lr=settings.weight_lr, fused=True, capturable=is_capturable)
        moving = (
            (self._steps.parameters, settings.activation_lr),
            (self._scales.parameters, settings.weight_step_lr),
            (self.biases.parameters, settings.bias_lr),
        )
        groups = [
            {"params": parameters, "lr": torch.tensor(rate, device=device) if is_recorded else rate, "first": rate}
            for parameters, rate in moving
            if parameters
        ]
        self._annealed = torch.optim.Adam(groups, fused=True, capturable=is_capturable) if groups else None
        self._coins = Coins(settings.keep_probability, draw.generator, draw.processes) if settings.keep_probability < 1.0 else None
        self._run = self._steps.running(piece, self._coins, unit.is_compiled, unit.is_narrow)
        self._is_recorded = is_recorded
        self._selections: list[Selection] = []
        self._held: Batch | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All that is learned."""
        return [self.rounding.logits, *self._steps.parameters, *self._scales.parameters, *self.biases.parameters]

    def feed(self, selections: list[Selection]) -> None:
        """Take the next mini-batch, one selection or several parts of it."""
        self._selections = selections
        if self._is_recorded:
            batch = self._draw.gathered(*selections, is_mixed=self._coins is not None)
            self._held = batch if self._held is None else self._held.filled(batch)

    def differentiate(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss of the mini-batch and the gradients that processes sum."""
        if self._annealed is not None:
            self._annealed.zero_grad(set_to_none=True)
        soft, biases = self.rounding.soft_weights(), self.biases.tensors()
        loss = torch.zeros((), device=self._draw.device)
        for selection in self._selections:
            batch = self._draw.gathered(selection, is_mixed=self._coins is not None) if self._held is None else self._held
            fed, targets = self._draw.mixed(batch, self._coins), batch.targets
            del batch  # the float stream, which is not needed while gradients are computed
            outputs = self._run(fed | self._constants | soft | biases)
            part = loss_of(outputs, targets, self._draw.shares) / self._draw.parts(selection, self._selections)
            if part.requires_grad:
                part.backward(retain_graph=selection is not self._selections[-1])  # the parts share the biases
            loss += part.detach()
        moving = [parameter.grad for parameter in (*self._steps.parameters, *self.biases.parameters) if parameter.grad is not None]
        return loss, [self.rounding.gradient, *moving]

    def schedule(self, iteration: int, beta: float | None) -> None:
        """Set what changes from step to step."""
        if beta is not None:
            self.rounding.regularise(self._settings.round_weight, beta)
        if self._annealed is not None:
            anneal(self._annealed, iteration, self._settings.iterations)

    def move(self, is_regularised: bool) -> None:
        """Move what is learned along the gradients."""
        self.rounding.set_gradient(is_regularised)
        self._of_weights.step()
        if self._annealed is not None:
            self._annealed.step()
            self._steps.keep_above(_SMALLEST_FACTOR)
            self._scales.keep_above(_SMALLEST_FACTOR)

    def learned(self) -> QuantTable:
        """The table with what was learned of weights and steps."""
        return self._table.updated(self._scales.applied(self.rounding.hard_codes(self._table)) | self._steps.grids())


@contextmanager
def _recorder(draw: Draw, is_recorded: bool) -> Iterator[Recorder]:
    if not is_recorded:
        yield lambda function: function
        return
    with recording.capturing(draw.generator) as capture, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it steps as it is at first
        yield lambda function: Recorded(function, capture)


def _beta(iteration: int, settings: Settings) -> float | None:
    """The regulariser's exponent: absent during the warm-up, then linear from beta_start to beta_end."""
    start = settings.warmup * settings.iterations
    if iteration < start:
        return None
    progress = (iteration - start) / max(settings.iterations - start, 1)
    return settings.beta_start + (settings.beta_end - settings.beta_start) * progress
