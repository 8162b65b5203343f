"""Quantize: compute in integers. One file per method; `placement` says where, which belongs to the target."""

from . import static

__all__ = ["static"]
