"""Scheme: the types and ranges that a target multiplies fastest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
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
    symmetric: bool = False  # ranges of activations are the same on both sides of zero
    per_channel: bool = True  # weights have a scale for each output channel

    @cached_property
    def activation_spec(self) -> QuantizationSpec:
        low, high = (0, 255) if self.activation is torch.uint8 else (-128, 127)
        return QuantizationSpec(
            dtype=self.activation,
            observer_or_fake_quant_ctr=OBSERVERS[self.observer].with_args(eps=EPS, **self.observer_settings),  # type: ignore[attr-defined]
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine,
        )

    @cached_property
    def weight_spec(self) -> QuantizationSpec:
        limit = 2 ** (self.weight_bits - 1) - 1
        observer = PerChannelMinMaxObserver if self.per_channel else MinMaxObserver
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=observer.with_args(eps=EPS),
            quant_min=-limit,
            quant_max=limit,
            qscheme=torch.per_channel_symmetric if self.per_channel else torch.per_tensor_symmetric,
            ch_axis=0 if self.per_channel else None,
        )

    @cached_property
    def row_spec(self) -> QuantizationSpec:
        """Of an embedding, whose rows are looked up and not multiplied: all 8 bits, a scale for each."""
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=EPS),
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )


def scheme(target: Target, signedness: str = "auto", **settings: Any) -> Scheme:
    """The types to use on `target`; signedness "auto" takes what its instruction set multiplies fastest.

    x86 multiplies unsigned by signed bytes; without a dot-product instruction it adds pairs of products in int16,
    which saturates unless weights keep to 7 bits (ONNX Runtime's documentation calls this reduce_range). Signed by
    signed is for Arm: on x86 ONNX Runtime leaves a signed convolution with relu in float.
    """
    instructions = target.int8_instructions()
    signed = instructions in (InstructionSet.neon, InstructionSet.neon_dotprod)
    name = signedness if signedness != "auto" else "s8s8" if signed else "u8s8"
    reduce_range = name == "u8s8" and instructions is InstructionSet.avx2
    reason = f"{'chosen for' if signedness == 'auto' else 'asked for; the target has'} {instructions.value}"
    if reduce_range:
        reason += ", weights in 7 bits because it has no int8 dot product"
    dtype = torch.int8 if name == "s8s8" else torch.uint8
    return Scheme(name, reason, dtype, 7 if reduce_range else 8, **settings)
