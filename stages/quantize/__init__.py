"""Quantize: compute in integers. One file per method; `placement` says where, which belongs to the target."""

from . import mixed, static

__all__ = ["mixed", "static"]
