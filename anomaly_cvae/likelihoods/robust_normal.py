"""Normal likelihood with a small share of outliers: one wild cell must not decide about the whole row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anomaly_cvae.encoding import FittedColumn
from anomaly_cvae.likelihoods.base import register
from anomaly_cvae.likelihoods.normal import HALF_LOG_TWO_PI, Normal

OUTLIER_SHARE = 1e-3
OUTLIER_WIDTH = 3.0
"""Half-width of the outliers' Cauchy distribution, in standard deviations of the column."""


@register
class RobustNormal(Normal):
    """(1 - e) N(mean, variance) + e Cauchy(0, w) of standardised values, e = 0.001, w = 3.

    The learned variance of a column that hardly ever moves is tiny, so under a plain normal one such cell
    costs thousands of nats, and differs between classes by hundreds for no reason. Here a cell far out
    costs about log(1 / e) + 2 log(distance): still the most surprising one of its row, but no more than
    that, and alike under every class, so that it cancels in the contrast. After Tukey (1960).

    Draws are of the normal part: the other stands for what the model does not know.
    """

    name = "robust_normal"

    def __init__(self, columns: Sequence[FittedColumn], scale_floor: float) -> None:
        super().__init__(columns, scale_floor)
        self.log_kept = math.log1p(-OUTLIER_SHARE)
        self.log_outlier = math.log(OUTLIER_SHARE) - math.log(math.pi * OUTLIER_WIDTH)

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log((1 - e) N(x | mean, variance) + e Cauchy(x | 0, w)) - log scale."""
        mean, raw = parameters.chunk(2, dim=-1)
        variance = self.variance(raw)
        kept = -0.5 * ((values - mean).square() / variance + torch.log(variance)) - (HALF_LOG_TWO_PI - self.log_kept)
        outlier = self.log_outlier - torch.log1p((values / OUTLIER_WIDTH).square())
        return torch.logaddexp(kept, outlier) - self.log_scale
