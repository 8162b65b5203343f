"""Quantize: compute in integers. One file per method; `placement` says where, which belongs to the target."""

from . import dynamic, half, simulated, static, weight_only

__all__ = ["dynamic", "half", "simulated", "static", "weight_only"]
