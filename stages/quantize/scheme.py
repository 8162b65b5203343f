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

from optpipe.target import InstructionSet, Target

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
        limit = 2 ** (self.weight_bits - 1) - 1
        return self._row_spec(limit) if self.per_channel else self._tensor_spec(limit)

    @cached_property
    def row_spec(self) -> QuantizationSpec:
        """Of an embedding, whose rows are looked up and not multiplied: all 8 bits, a scale for each."""
        return self._row_spec(127)

    def _row_spec(self, limit: int) -> QuantizationSpec:
        observer = MovingAveragePerChannelMinMaxObserver if self.training else PerChannelMinMaxObserver
        now: dict[str, Any] = (
            {"averaging_constant": 1.0} if self.training else {}
        )  # the weights as they are at this step
        return self._spec(torch.int8, -limit, limit, torch.per_channel_symmetric, observer, 0, **now)

    def _tensor_spec(self, limit: int) -> QuantizationSpec:
        observer = MovingAverageMinMaxObserver if self.training else MinMaxObserver
        now: dict[str, Any] = {"averaging_constant": 1.0} if self.training else {}
        return self._spec(torch.int8, -limit, limit, torch.per_tensor_symmetric, observer, **now)

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


def scheme(target: Target, signedness: str = "auto", **settings: Any) -> Scheme:
    """The types to use on `target`; signedness "auto" takes what its instruction set multiplies fastest.

    x86 multiplies unsigned by signed bytes. Signed by signed is for Arm: on x86 ONNX Runtime leaves a signed
    convolution with relu in float.
    """
    instructions = target.int8_instructions()
    signed = instructions in (InstructionSet.neon, InstructionSet.neon_dotprod)
    name = signedness if signedness != "auto" else "s8s8" if signed else "u8s8"
    weight_bits = target.weight_bits if name == "u8s8" else 8
    reason = f"{'chosen for' if signedness == 'auto' else 'asked for; the target has'} {instructions.value}"
    if weight_bits < 8:
        reason += ", weights in 7 bits because it has no int8 dot product"
    dtype = torch.int8 if name == "s8s8" else torch.uint8
    return Scheme(name, reason, dtype, weight_bits, **settings)
