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
    from .qat import Qat
    from .scheme import Scheme
    from .static import Static

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
        return next((one for one, runtime in OF_RUNTIME.items() if runtime == target.runtime), Placement.onnxruntime)


OF_RUNTIME = {
    Placement.onnxruntime: "onnxruntime",
    Placement.openvino: "openvino",
    Placement.inductor: "aotinductor",
    Placement.xnnpack: "executorch",
}


def is_signed(placement: Placement, target: Target) -> bool:
    """Whether activations are int8, and not uint8.

    x86 multiplies unsigned by signed bytes, Arm signed by signed: on x86 ONNX Runtime leaves a signed convolution with
    relu in float. XNNPACK has signed kernels only.
    """
    return placement is Placement.xnnpack or target.int8_instructions() in ARM


def unmet(settings: Static | Qat, target: Target) -> list[str]:
    """Why nothing can be quantised for the engine that `settings` ask for, in words that name the remedy."""
    engine, signedness = settings.placement.for_target(target), settings.signedness.value
    asked = f"placement={engine.value}"
    found = []
    if engine is Placement.xnnpack and importlib.util.find_spec("executorch") is None:
        found.append(f'{asked} needs ExecuTorch, not installed here; pip install "optpipe[executorch]"')
    if engine is Placement.xnnpack and signedness == "u8s8":
        found.append(f"{asked} has signed activations only, but signedness is u8s8; leave it at auto")
    if engine is Placement.inductor and signedness == "s8s8" and not is_signed(engine, target):
        found.append(f"{asked} has unsigned activations only on x86, but signedness is s8s8; leave it at auto")
    if engine is Placement.inductor:
        import torch

        if settings.weights.value != "per_channel":
            found.append(
                f"{asked} packs weights with a scale per channel only, but weights is per_tensor; set it to per_channel"
            )
        if target.is_host and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            found.append(
                f"{asked} multiplies int8 with oneDNN, which this build of PyTorch lacks; what this machine has is "
                f"placement={' or '.join(_installed())}"
            )
    return found


def _installed() -> list[str]:
    """Engines of our own placement that are installed here."""
    return [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]


def quantizer_for(placement: Placement, ctx: Context, scheme: Scheme, keep: Iterable[str]) -> Annotator:
    """What annotates a graph for the engine that `placement` names; the report says if another one is timed."""
    from .borrowed import Borrowed
    from .placement import ONNX_RUNTIME, OPENVINO, IntegerQuantizer

    engine = placement.for_target(ctx.target)
    if OF_RUNTIME[engine] != ctx.target.runtime:
        ctx.note(
            f"placed for {engine.value}; {ctx.target.runtime}, which the target names, may compute parts of it in float"
        )
    if engine is Placement.inductor:
        return Borrowed("torchao's quantiser for Inductor", *_inductor(scheme, ctx.target), scheme, keep)
    if engine is Placement.xnnpack:
        return Borrowed("ExecuTorch's quantiser for XNNPACK", *_xnnpack(scheme), scheme, keep)
    return IntegerQuantizer(scheme, keep, OPENVINO if engine is Placement.openvino else ONNX_RUNTIME)


def _inductor(scheme: Scheme, target: Target) -> tuple[Quantizer, Any]:
    """torchao's own, whose patterns Inductor replaces, and its kind of annotation."""
    with warnings.catch_warnings(action="ignore"):  # of what these modules import in their turn
        from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    if target.int8_instructions() in ARM:
        return arm.ArmInductorQuantizer().set_global(_config(scheme)), arm._ArmInductorQuantizationAnnotation
    return x86.X86InductorQuantizer().set_global(_config(scheme)), x86._X86InductorQuantizationAnnotation


def _xnnpack(scheme: Scheme) -> tuple[Quantizer, Any]:
    """ExecuTorch's own, whose patterns its partitioner delegates, and its kind of annotation."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    with warnings.catch_warnings(action="ignore"):  # of what these modules import in their turn
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    return XNNPACKQuantizer().set_global(_config(scheme)), QuantizationAnnotation


def _config(scheme: Scheme) -> Any:
    """`scheme` in torchao's words; biases stay float, and their engine rounds them."""
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig

    activation, weight = scheme.activation_spec, scheme.weight_spec
    return QuantizationConfig(activation, activation, weight, None, is_qat=scheme.training)
