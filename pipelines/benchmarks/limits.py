"""What the machine can do at all: matrix products at the reference widths, copying, reading Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from reference import CLASSES, COLUMNS, HIDDEN, LATENT, Job, seconds, table
from torch import Tensor

ROWS = (1024, 2048, 4096)
WIDTHS = ((COLUMNS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * COLUMNS), (LATENT + CLASSES, HIDDEN))
LEAST_OPERATIONS = 2e10
"""Of one measurement, so that it lasts about a tenth of a second."""
TRIES = 5
COPIED_BYTES = 1 << 28


def fastest_products(least_operations: float = LEAST_OPERATIONS) -> dict[str, Job]:
    """Products at the reference widths through MKL and oneDNN in float32, and in bfloat16; amounts in operations.

    Of each way, the shape that was fastest in a short trial. oneDNN is asked for through the operator that torch's own
    compiler uses, as `x @ w` in float32 goes to MKL; its weights are also tried in the layout that oneDNN prefers.
    """
    tried: dict[str, list[tuple[float, str, Callable[[], Tensor], int]]] = {}
    for rows in ROWS:
        for wide, narrow in WIDTHS:
            operations = 2 * rows * wide * narrow
            for name, product in _products(rows, wide, narrow):
                product()
                rate = operations / min(seconds(product) for _ in range(TRIES))
                shape = f"{name}, {rows} x {wide} x {narrow}"
                tried.setdefault(name, []).append((rate, shape, product, operations))
    jobs = {}
    for ways in tried.values():
        _, shape, product, operations = max(ways, key=lambda way: way[0])
        times = max(1, int(least_operations / operations))
        jobs[shape] = Job(_repeated(product, times), operations * times)
    return jobs


def _products(rows: int, wide: int, narrow: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    x, weight, bias = torch.randn(rows, wide), torch.randn(narrow, wide), torch.zeros(narrow)
    turned = weight.t().contiguous()
    short_x, short_weight = x.bfloat16(), turned.bfloat16()
    yield "float32 MKL", lambda: x @ turned
    if torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        yield "float32 oneDNN", lambda: linear(x, weight, bias, "none", [], "")
        yield "float32 oneDNN packed", lambda: linear(x, packed, bias, "none", [], "")
    yield "bfloat16", lambda: short_x @ short_weight


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    @torch.inference_mode()
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def copying(n_bytes: int = COPIED_BYTES) -> Job:
    """Copying memory; the amount counts the bytes read and the bytes written."""
    source = torch.ones(n_bytes // 4)
    target = torch.empty_like(source)
    return Job(lambda: target.copy_(source), 2 * n_bytes)


def reading_parquet(folder: Path, n_rows: int) -> Job:
    """Reading 64 float32 columns with pyarrow, as they lie in the file; the amount is rows."""
    path = folder / "limit.parquet"
    pq.write_table(pa.Table.from_pandas(table(n_rows).drop(columns="c"), preserve_index=False), path)
    # Not as many threads as there are cores, but as many as torch may use.
    pa.set_cpu_count(torch.get_num_threads())
    return Job(lambda: pq.read_table(path), n_rows)
