"""How tables, cells and progress look on a terminal, and values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from anomaly_cvae.batch.results import Progress

SECONDS_BETWEEN_LINES = 30.0


class ProgressLines:
    """Says how far a job is, every half minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.next = say, SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        """A line, if the last one was long enough ago."""
        if progress.seconds < self.next:
            return
        self.next = progress.seconds + SECONDS_BETWEEN_LINES
        self.say(f"{progress.done:.0%}: {how_far(progress)}, at {plain_text(progress.path.name)}")


def how_far(progress: Progress) -> str:
    """Rows, rows per second and time left."""
    said = f"{progress.rows:,} rows, {progress.rows_per_second:,.0f} rows/s"
    left = progress.seconds_left
    if not math.isfinite(left):
        return said
    time = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
    return f"{said}, about {time} left"


def new_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """An empty table; ``numbers`` are columns of figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def plain_text(text: str) -> str:
    """Text without a meaning for rich: a column may be called ``Torque [Nm]``."""
    from rich.markup import escape

    return escape(text)


def cell(value: Any) -> str:
    """A cell of a row; of an image its size."""
    if is_missing(value):
        return "missing"
    if is_array(value):
        return f"({' x '.join(map(str, value.shape))} image)"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return plain_text(str(value))


def is_missing(value: Any) -> bool:
    """None, NaN or NA."""
    if is_array(value):
        return False
    return value is None or value != value or type(value).__name__ == "NAType"


def is_array(value: Any) -> bool:
    """Whether a cell is an image."""
    return getattr(value, "ndim", 0) in (2, 3) and hasattr(value, "shape")


def nats(value: Any) -> str:
    """Nats with two decimals."""
    return "" if is_missing(value) else f"{value:.2f}"


def share(value: Any) -> str:
    """A figure from 0 to 1, such as an AUROC."""
    return "" if is_missing(value) else f"{value:.4f}"


def percent(value: Any, digits: int = 0) -> str:
    """A share in percent."""
    return "" if is_missing(value) else f"{value:.{digits}%}"


def lines(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a table, the index among their cells, as JSON has them."""
    return records(table.reset_index())


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a table without its index, as JSON has them."""
    return [{str(k): plain(v) for k, v in row.items()} for row in table.to_dict(orient="records")]


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, no numpy; of an image its size."""
    if is_array(value):
        return cell(value)
    if hasattr(value, "item"):
        value = value.item()
    if is_missing(value) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, (str, int, float, bool, dict, list)) else str(value)
