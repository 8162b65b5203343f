"""What `target.options` may hold for each engine, known without importing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GRAPH_LEVELS = ("off", "basic", "extended", "all")
PRECISIONS = ("f32", "bf16", "f16")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is '{value}'; it must be one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """https://onnxruntime.ai/docs/performance/tune-performance"""

    spinning: bool = True  # threads wait for work awake: shorter calls, and a core that is never free for others
    arena: bool = True  # memory is kept between calls
    graph_level: str = "all"  # of the runtime's own graph optimisations
    inter_threads: int = 1  # operators at once; above 1 they run in parallel
    providers: list[str] = field(default_factory=list)  # by default those of the device
    provider_options: dict[str, Any] = field(
        default_factory=dict
    )  # by provider, for example {"TensorrtExecution…": {}}

    def __post_init__(self) -> None:
        _one_of("graph_level", self.graph_level, GRAPH_LEVELS)
        if self.inter_threads < 1:
            raise ValueError(f"inter_threads is {self.inter_threads}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """https://docs.openvino.ai, CPU device."""

    precision: str = "f32"  # of what is not integers: a processor with bf16 instructions would take them unasked
    streams: int = 1  # requests at once
    shapes: int = 8  # compile for each of so many shapes when it first comes, which is faster; 0: once, for all

    def __post_init__(self) -> None:
        if self.shapes < 0:
            raise ValueError(f"shapes is {self.shapes}; it must not be negative")
        _one_of("precision", self.precision, PRECISIONS)
        if self.streams < 1:
            raise ValueError(f"streams is {self.streams}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Eager PyTorch, or torch.compile."""

    compile: bool = False  # by Inductor, when the model is first called: seconds
    channels_last: bool = False  # the memory layout that vector units like best for convolutions
    autocast: str = ""  # "bf16" or "f16": what matrix products and convolutions compute in
    tf32: bool = False  # on a GPU: float32 products with 10 bits of mantissa
    cudnn_benchmark: bool = False  # on a GPU: try algorithms on the first call of each shape

    def __post_init__(self) -> None:
        _one_of("autocast", self.autocast, ("", "bf16", "f16"))


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """What was decided when the file was made."""


OPTIONS: dict[str, Any] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "torch": Torch,
    "aotinductor": Nothing,
    "executorch": Nothing,
    "tensorrt": Nothing,
}
