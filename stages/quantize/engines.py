"""Engines: whose integer operators a graph is quantised for, what each takes, and what it needs on this machine."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from optpipe.target import InstructionSet, Target

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

    from optpipe.context import Context

    from .borrowed import Borrowed
    from .placement import IntegerQuantizer
    from .scheme import Scheme

    Annotator: TypeAlias = IntegerQuantizer | Borrowed

ARM = (InstructionSet.neon, InstructionSet.neon_dotprod)


class Placement(Enum):
    """Whose integer operators."""

    auto = "auto"  # those of target.runtime; of ONNX Runtime where that has none
    onnxruntime = "onnxruntime"
    openvino = "openvino"
    inductor = "inductor"  # torch.compile and AOTInductor
    xnnpack = "xnnpack"  # ExecuTorch's on phones and small boards

    def for_target(self, target: Target) -> Placement:
        """The same with `auto` replaced."""
        if self is not Placement.auto:
            return self
        return Placement[target.runtime] if target.runtime in Placement.__members__ else Placement.onnxruntime


def is_signed(placement: Placement, target: Target) -> bool:
    """Whether activations are int8, and not uint8.

    x86 multiplies unsigned by signed bytes, Arm signed by signed: on x86 ONNX Runtime leaves a signed convolution with
    relu in float. XNNPACK has signed kernels only.
    """
    return placement is Placement.xnnpack or target.int8_instructions() in ARM


def problems(placement: Placement, target: Target, *, signedness: str = "auto", per_channel: bool = True) -> list[str]:
    """Why nothing can be quantised for this engine, in words that name the remedy; empty if it can."""
    engine = placement.for_target(target)
    asked = f"placement={engine.value}" if placement is engine else f"target.runtime={engine.value}"
    found = []
    if engine is Placement.xnnpack and importlib.util.find_spec("executorch") is None:
        found.append(f'{asked} needs ExecuTorch, not installed here; pip install "optpipe[executorch]"')
    if engine is Placement.xnnpack and signedness == "u8s8":
        found.append(f"{asked} has signed activations only, but signedness is u8s8; leave it at auto")
    if engine is Placement.inductor:
        import torch

        if not per_channel:
            found.append(f"{asked} packs weights with a scale per channel only, but weights is per_tensor")
        if target.is_host and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            found.append(
                f"{asked} multiplies int8 with oneDNN, which this build of PyTorch lacks; placements for what this "
                "machine has are onnxruntime and openvino"
            )
    return found


def quantizer_for(placement: Placement, ctx: Context, scheme: Scheme, keep: Iterable[str]) -> Annotator:
    """What annotates a graph for the engine that `placement` names; the report says if another one is timed."""
    from .borrowed import Borrowed
    from .placement import ONNX_RUNTIME, OPENVINO, IntegerQuantizer

    engine = placement.for_target(ctx.target)
    if engine.value != ctx.target.runtime:
        ctx.note(f"placed for {engine.value}, but run in {ctx.target.runtime}, which may compute parts of it in float")
    if engine is Placement.inductor:
        return Borrowed("Inductor", _inductor(scheme, ctx.target), scheme, keep)
    if engine is Placement.xnnpack:
        return Borrowed("XNNPACK", _xnnpack(scheme), scheme, keep)
    return IntegerQuantizer(scheme, keep, OPENVINO if engine is Placement.openvino else ONNX_RUNTIME)


def _inductor(scheme: Scheme, target: Target) -> Quantizer:
    """torchao's own: Inductor replaces the very patterns that it annotates."""
    with warnings.catch_warnings(action="ignore"):  # of what these modules import in their turn
        from torchao.quantization.pt2e.quantizer.arm_inductor_quantizer import ArmInductorQuantizer
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    kind = ArmInductorQuantizer if target.int8_instructions() in ARM else X86InductorQuantizer
    return kind().set_global(_config(scheme))


def _xnnpack(scheme: Scheme) -> Quantizer:
    """ExecuTorch's own: its partitioner delegates the very patterns that it annotates."""
    with warnings.catch_warnings(action="ignore"):  # of what these modules import in their turn
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    return XNNPACKQuantizer().set_global(_config(scheme))


def _config(scheme: Scheme) -> Any:
    """`scheme` in torchao's words; biases stay float, and their engine rounds them."""
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig

    activation, weight = scheme.activation_spec, scheme.weight_spec
    return QuantizationConfig(activation, activation, weight, None, is_qat=scheme.training)
