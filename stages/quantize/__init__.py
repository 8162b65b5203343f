"""Quantize: compute in integers. One file per method; `placement` says where, which belongs to the target."""

from . import mixed, qat, static

__all__ = ["mixed", "qat", "static"]
