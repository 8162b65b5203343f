"""Schedule: how long, how fast and in which precision to train. The settings that every stage which trains has."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Rate(Enum):
    """How the learning rate moves after it has risen during the warm-up."""

    one_cycle = "one_cycle"  # down to next to nothing along a cosine, momentum against it (Smith & Topin 2019)
    cosine = "cosine"  # down to 0 along half a cosine (Loshchilov & Hutter 2017)
    linear = "linear"  # down to 0 on a straight line
    constant = "constant"


class Precision(Enum):
    """What the model computes in while it is trained; its weights stay in fp32 (Micikevicius et al. 2018)."""

    fp32 = "fp32"
    bf16_mixed = "bf16_mixed"
    fp16_mixed = "fp16_mixed"  # with dynamic loss scaling: a step whose gradients overflow is left out


@dataclass(kw_only=True)
class Schedule:
    """AdamW (Loshchilov & Hutter 2019) over batches of the training data."""

    epochs: int
    learning_rate: float  # the highest
    weight_decay: float = 0.01
    patience: int = 0  # stop after so many epochs without a better one; 0 trains them all
    rate: Rate = Rate.one_cycle
    warmup: float = 0.3  # share of the training in which the learning rate rises
    accumulate: int = 1  # batches whose gradients are averaged for one step
    clip_norm: float = 0.0  # longest gradient, over all weights; 0 leaves it as it is
    ema: float = 0.0  # decay of the weights' moving average, which then is judged and kept; 0 keeps the weights
    precision: Precision = Precision.fp32
    checkpointing: list[str] = field(default_factory=list)  # module name patterns computed again in the backward pass
    processes: int = 1  # that share every batch; each reads the model and the data anew, which takes seconds

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("accumulate", 1), ("processes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("patience", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
