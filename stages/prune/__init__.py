"""Prune: leave out what matters least. One file per method.

`layers` finds the layers that a pattern names, `groups` the channels that can only go together, `loss_gradients` what
the loss says of weights, and `zeros` writes zeros that later training keeps.
"""

from . import channels, gradient, low_rank, magnitude, nm

__all__ = ["channels", "gradient", "low_rank", "magnitude", "nm"]
