"""Hyper-parameters of one unit's reconstruction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one unit's reconstruction; defaults are those of the MRECG and QDrop releases where nothing else is said.

    Attributes:
        iterations: steps of Adam.
        batch_size: samples per step, drawn anew for each.
        weight_lr: learning rate of the rounding logits V.
        activation_lr: learning rate of the activation steps, as a share of each calibrated step, annealed to 0 by a cosine; 0 leaves them
            as calibrated. The papers' absolute 4e-5 is this for a step of 0.4, which is that of a ReLU6 at 4 bits.
        weight_step_lr: learning rate of the steps of weights, as a share of each channel's, annealed alike; 0 (the papers) leaves them.
        bias_lr: learning rate of the biases, as a share of the magnitude of each channel, annealed alike; 0 (the papers) leaves them.
        keep_probability: chance that an activation element is quantized during learning (QDrop 0.5, BRECQ 1.0).
        round_weight: weight of the rounding regulariser (the papers' lambda).
        warmup: share of the iterations without regulariser.
        beta_start, beta_end: the regulariser's exponent, annealed linearly after the warm-up.
        early_stop: share of decided roundings at which a unit is done; None for never.
    """

    iterations: int = 20000
    batch_size: int = 32
    weight_lr: float = 1e-3
    activation_lr: float = 1e-4
    weight_step_lr: float = 1e-4
    bias_lr: float = 1e-5
    keep_probability: float = 0.5
    round_weight: float = 0.01
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    early_stop: float | None = None
