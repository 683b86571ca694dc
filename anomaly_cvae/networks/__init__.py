"""Networks of a bank: every tensor has a leading member axis."""

from anomaly_cvae.networks.cells import Blocks, CellDecoder, CellEncoder, Cells, Encoding, PseudoInputs
from anomaly_cvae.networks.conditions import Condition
from anomaly_cvae.networks.precision import full_float32, has_bfloat16
from anomaly_cvae.networks.stacked import ALL, StackedLinear, StackedMLP

__all__ = [
    "ALL",
    "Blocks",
    "CellDecoder",
    "CellEncoder",
    "Cells",
    "Condition",
    "Encoding",
    "PseudoInputs",
    "StackedLinear",
    "StackedMLP",
    "full_float32",
    "has_bfloat16",
]
