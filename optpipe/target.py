"""Target: where the model will run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from optpipe.machine import cpu


class InstructionSet(Enum):
    """What the target's processor computes int8 with. `host` stands for this machine's best."""

    host = "host"
    avx2 = "avx2"  # no int8 dot product: u8 × s8 pairs saturate in int16
    avx512_vnni = "avx512_vnni"
    avx_vnni = "avx_vnni"
    avx_vnni_int8 = "avx_vnni_int8"
    amx_int8 = "amx_int8"
    neon = "neon"
    neon_dotprod = "neon_dotprod"


@dataclass(kw_only=True)
class Target:
    """Runtime, device, threads and batch sizes that every figure of a run is measured with."""

    runtime: str = "onnxruntime"
    options: dict[str, Any] = field(default_factory=dict)  # of that runtime; see optpipe.runtimes.options
    device: str = "cpu"  # or cuda, cuda:1
    threads: int = 1  # of one inference call
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 8, 16])  # of the benchmark's grid
    instruction_set: InstructionSet = InstructionSet.host

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes is {list(self.batch_sizes)}; it must list sizes of at least 1")

    @property
    def is_host(self) -> bool:
        """Whether this machine can execute what is placed for the target."""
        return self.instruction_set in (InstructionSet.host, *host_instruction_sets())

    def elsewhere(self) -> str:
        """Why nothing can be timed here, for a target that is not this machine."""
        return f"the target's instruction set is {self.instruction_set.value}, which this machine does not have"

    def int8_instructions(self) -> InstructionSet:
        """The instruction set to place int8 for."""
        return host_instruction_sets()[0] if self.instruction_set is InstructionSet.host else self.instruction_set

    @property
    def weight_bits(self) -> int:
        """Of int8 weights beside unsigned activations: 7 where pairs of products, added in int16, would saturate.

        ONNX Runtime's documentation calls this reduce_range.
        """
        return 7 if self.int8_instructions() is InstructionSet.avx2 else 8


def host_instruction_sets() -> list[InstructionSet]:
    """The int8 instruction sets of this machine, the most capable first."""
    _, isa = cpu()
    names = {
        InstructionSet.amx_int8: "amx_int8",
        InstructionSet.avx_vnni_int8: "avx_vnni_int8",
        InstructionSet.avx512_vnni: "avx512_vnni",
        InstructionSet.avx_vnni: "avx_vnni",
        InstructionSet.avx2: "avx2",
        InstructionSet.neon_dotprod: "asimddp",
        InstructionSet.neon: "asimd",
    }
    return [instructions for instructions, name in names.items() if name in isa] or [InstructionSet.avx2]
