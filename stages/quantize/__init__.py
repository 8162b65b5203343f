"""Quantize: compute, or store, in fewer bits. One file per method.

`placement` says which tensors are integers, which belongs to the target, and `scheme` of which types; `posttraining`
and `fakequant` are the ways there, and `sensitivity` what each layer costs.
"""

from . import dynamic, half, mixed, qat, simulated, static, weight_only

__all__ = ["dynamic", "half", "mixed", "qat", "simulated", "static", "weight_only"]
