"""Encoded rows as tensors on a device, and the batches that a model takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from anomaly_cvae.encoding import ClassScaling, Encoded
from anomaly_cvae.frames import FloatArray, IntArray
from anomaly_cvae.networks import Condition
from anomaly_cvae.schema import Schema


@dataclass(frozen=True)
class Batch:
    """What the model sees: values and observed (M or 1, N, D), and the condition of N rows, or of all.

    ``observed`` is None where every cell is there, ``condition`` where the members know one class only.
    ``log_scale`` (M or 1, N or 1, D) is the logarithm of the class's scale, which belongs to the density.
    ``given`` (M or 1, N, D) are cells that belong to the condition; ``class_index`` (M or 1, N) is each
    row's class, -1 where it is not known.
    """

    values: Tensor
    observed: Tensor | None
    condition: Condition | None
    log_scale: Tensor | None = None
    given: Tensor | None = None
    class_index: Tensor | None = None


@dataclass(frozen=True)
class DeviceRows:
    """All rows of a table on the device, in units of their class; `batch` gathers some for every member.

    ``condition`` (N, C) are the vectors and ``codes`` (N, Q) the places of their ones, if they are codes of levels.
    """

    values: Tensor
    observed: Tensor | None
    condition: Tensor | None
    log_scale: Tensor | None = None
    class_index: Tensor | None = None
    codes: Tensor | None = None

    @classmethod
    def of(
        cls,
        encoded: Encoded,
        classes: Condition | None,
        scaling: ClassScaling | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        may_miss: bool = False,
    ) -> DeviceRows:
        """Move ``encoded`` to the device; ``classes`` are the conditions of all classes, coded if no row lacks its own.

        ``may_miss``: rows that come later may lack cells, even if these do not.
        """
        complete = not may_miss and bool(encoded.observed.all())
        condition = codes = None
        if classes is not None:
            known = np.maximum(encoded.class_index, 0)
            labelled = torch.as_tensor(encoded.class_index >= 0, device=device)
            # A row without a class has no condition; what it is worth under each is the objective's to sum.
            own = classes.vectors[torch.as_tensor(known, device=device)] * labelled.unsqueeze(1)
            condition = torch.cat([own, tensor(encoded.continuous, device, dtype)], dim=1)
            if classes.codes is not None and not encoded.continuous.shape[1]:
                assert (encoded.class_index >= 0).all(), "a row without a class has no codes"
                codes = classes.codes[torch.as_tensor(encoded.class_index, device=device)]
        values, log_scale = encoded.values, None
        if scaling is not None:
            values = scaling.to_class_units(values, encoded.class_index)
            log_scale = tensor(np.log(scaling.scale)[encoded.class_index], device, dtype)
        class_index = torch.as_tensor(encoded.class_index, device=device)
        return cls(
            values=tensor(values, device, dtype),
            observed=None if complete else tensor(encoded.observed, device, dtype),
            condition=condition,
            log_scale=log_scale,
            class_index=class_index,
            codes=codes,
        )

    def batch(self, rows: Tensor) -> Batch:
        """Rows (M, B) of each member."""
        flat = rows.flatten()

        def of(part: Tensor | None) -> Tensor | None:
            # Copies whole rows, where indexing would work out the place of every number.
            return None if part is None else part.index_select(0, flat).reshape(*rows.shape, *part.shape[1:])

        parts = {field.name: of(getattr(self, field.name)) for field in fields(self)}
        vectors, codes = parts.pop("condition"), parts.pop("codes")
        condition = None if vectors is None else Condition(vectors, codes)
        return Batch(condition=condition, **parts)  # type: ignore[arg-type]  # values are never None

    def replace(self, places: IntArray, other: DeviceRows, rows: IntArray) -> None:
        """Put ``rows`` of another table in the ``places`` of this one, in place."""
        to, of = (torch.as_tensor(numbers, device=self.values.device) for numbers in (places, rows))
        for field in fields(self):
            own, new = getattr(self, field.name), getattr(other, field.name)
            if own is not None:
                own[to] = new[of]


def tensor(values: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy on the device, never the caller's memory: it may be read-only, or change."""
    return torch.from_numpy(np.array(values, dtype=_NUMPY[dtype])).to(device)


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def class_conditions(schema: Schema) -> FloatArray:
    """One vector per class, (K, C): the levels of every categorical condition, one-hot, side by side."""
    blocks = []
    for q, condition in enumerate(schema.categorical_conditions):
        position = {level: code for code, level in enumerate(condition.levels)}
        codes = [position[levels[q]] for levels in schema.classes]
        blocks.append(np.eye(len(condition.levels))[codes])
    return np.concatenate([np.zeros((len(schema.classes), 0)), *blocks], axis=1)
