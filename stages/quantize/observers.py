"""Observers: how the range of an activation is found from calibration data.

torchao's, and two more choices of a range from the histogram that it collects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

CANDIDATES = 100  # ranges that MseObserver tries


class PercentileObserver(HistogramObserver):  # type: ignore[misc]
    """Cuts as many values off either end as lie beyond the percentile (Wu et al. 2020, §3.2)."""

    def __init__(self, percentile: float = 99.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.percentile = percentile

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        below = torch.cumsum(self.histogram, 0) / self.histogram.sum()
        cut = (1 - self.percentile / 100) / 2
        first = int((below <= cut).sum())  # bins that lie wholly below
        last = int((below < 1 - cut).sum())
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + first * width, self.min_val + (last + 1) * width


class MseObserver(HistogramObserver):  # type: ignore[misc]
    """The shrunken range with the least squared error, of rounding and of clipping (Nagel et al. 2021, §3.1).

    HistogramObserver moves one end at a time and stops at the first increase; this looks at CANDIDATES shares of the
    whole range.
    """

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        width = (self.max_val - self.min_val) / self.bins
        values = self.min_val + width * (torch.arange(self.bins) + 0.5)
        shares = torch.linspace(1 / CANDIDATES, 1, CANDIDATES).unsqueeze(1)
        low, high = shares * self.min_val.clamp(max=0), shares * self.max_val.clamp(min=0)
        if self.qscheme is torch.per_tensor_symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / (self.quant_max - self.quant_min)).clamp(min=float(self.eps))
        rounded = torch.round(values.clamp(low, high) / scale) * scale
        errors = ((rounded - values) ** 2 * self.histogram).sum(1)
        best = int(errors.argmin())
        return low[best, 0], high[best, 0]


OBSERVERS: dict[str, Callable[..., Any]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
}
