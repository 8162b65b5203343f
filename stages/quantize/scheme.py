"""Scheme: the types and ranges that a target multiplies fastest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from optpipe.target import Target

from .engines import Placement, is_signed
from .observers import OBSERVERS

EPS = 2.0**-24  # smallest scale: torchao's default, 2^-12, is coarse for weights near zero


@dataclass(frozen=True)
class Scheme:
    """Types and ranges of quantised tensors."""

    name: str  # "u8s8"
    reason: str
    activation: torch.dtype
    weight_bits: int  # 7 where pairs of products would saturate int16
    observer: str = "histogram"
    observer_settings: dict[str, Any] = field(default_factory=dict)
    symmetric: bool = False  # ranges of activations are the same on both sides of zero, but behind a relu
    per_channel: bool = True  # weights have a scale for each output channel
    training: bool = False  # tensors are rounded while they are observed, and gradients pass straight through

    @cached_property
    def activation_spec(self) -> QuantizationSpec:
        return self._activation_spec(torch.per_tensor_symmetric) if self.symmetric else self.clamped_spec

    @cached_property
    def clamped_spec(self) -> QuantizationSpec:
        """Behind a relu: from zero up, also where other ranges are symmetric, so that the range can stand for it."""
        return self._activation_spec(torch.per_tensor_affine)

    def _activation_spec(self, scheme: torch.qscheme) -> QuantizationSpec:
        low, high = (0, 255) if self.activation is torch.uint8 else (-128, 127)
        return self._spec(self.activation, low, high, scheme, OBSERVERS[self.observer], **self.observer_settings)

    @cached_property
    def weight_spec(self) -> QuantizationSpec:
        return self._channel_spec(self._limit) if self.per_channel else self.tensor_spec

    @cached_property
    def column_spec(self) -> QuantizationSpec:
        """Of a transposed convolution's weight, whose output channels are in dimension 1."""
        return self._channel_spec(self._limit, axis=1) if self.per_channel else self.tensor_spec

    @cached_property
    def row_spec(self) -> QuantizationSpec:
        """Of an embedding, whose rows are looked up and not multiplied: all 8 bits, a scale for each."""
        return self._channel_spec(127)

    @property
    def _limit(self) -> int:
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def _now(self) -> dict[str, Any]:
        """What makes a moving average take weights as they are at this step."""
        return {"averaging_constant": 1.0} if self.training else {}

    def _channel_spec(self, limit: int, axis: int = 0) -> QuantizationSpec:
        observer = MovingAveragePerChannelMinMaxObserver if self.training else PerChannelMinMaxObserver
        return self._spec(torch.int8, -limit, limit, torch.per_channel_symmetric, observer, axis, **self._now)

    @cached_property
    def tensor_spec(self) -> QuantizationSpec:
        observer = MovingAverageMinMaxObserver if self.training else MinMaxObserver
        return self._spec(torch.int8, -self._limit, self._limit, torch.per_tensor_symmetric, observer, **self._now)

    def _spec(
        self, dtype: torch.dtype, low: int, high: int, scheme: torch.qscheme, observer: Any, axis: int | None = None,
        **settings: Any,
    ) -> QuantizationSpec:  # fmt: skip
        create = observer.with_args(eps=EPS, **settings)
        if self.training:
            of = {"dtype": dtype, "quant_min": low, "quant_max": high, "qscheme": scheme, "eps": EPS, **settings}
            of |= {} if axis is None else {"ch_axis": axis}
            create = FusedMovingAvgObsFakeQuantize.with_args(observer=observer, **of)
        return QuantizationSpec(
            dtype=dtype, observer_or_fake_quant_ctr=create, quant_min=low, quant_max=high, qscheme=scheme, ch_axis=axis
        )


def scheme(target: Target, signedness: str = "auto", placement: Placement = Placement.auto, **settings: Any) -> Scheme:
    """The types to use on `target`; signedness "auto" takes what the engine multiplies fastest there."""
    engine, instructions = placement.for_target(target), target.int8_instructions()
    name = signedness if signedness != "auto" else "s8s8" if is_signed(engine, target) else "u8s8"
    weight_bits = target.weight_bits if name == "u8s8" else 8
    chosen = f"chosen for {'XNNPACK' if engine is Placement.xnnpack else instructions.value}"
    reason = chosen if signedness == "auto" else f"asked for; the target has {instructions.value}"
    if weight_bits < 8:
        reason += ", weights in 7 bits because it has no int8 dot product"
    return Scheme(name, reason, torch.int8 if name == "s8s8" else torch.uint8, weight_bits, **settings)
