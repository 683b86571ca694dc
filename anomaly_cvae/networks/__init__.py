"""Networks of a bank: every tensor has a leading member axis."""

from anomaly_cvae.networks.stacked import ALL, StackedLinear, StackedMLP

__all__ = ["ALL", "StackedLinear", "StackedMLP"]
