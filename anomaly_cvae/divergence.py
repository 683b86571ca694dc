"""The losses of training steps, and where the first one that is not finite comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from anomaly_cvae.objectives import Loss, accumulator
from anomaly_cvae.rows import Batch


@dataclass(frozen=True)
class Blame:
    """What is not finite: losses of members (M,), and of each cell the rows' values and the terms, (M, D) each."""

    losses: Tensor
    values: Tensor
    terms: Tensor

    @classmethod
    def of(cls, loss: Tensor, batch: Batch, found: Loss) -> Blame:
        """Look through a step: losses (M,), its batch, and the terms that they are sums of."""
        values = (~torch.isfinite(batch.values)).any(1)
        terms = torch.zeros_like(values)
        if found.log_prob is not None:
            terms = (~torch.isfinite(found.log_prob.detach())).any(1).any(1)
        return cls(~torch.isfinite(loss), values, terms)

    def culprit(self) -> tuple[int, int]:
        """A member, and the cell that is to blame; -1 where it is none or all of them."""
        member = int(self.losses.nonzero()[0])
        # A cell that is not finite spoils z and so every column: look at the rows before the terms.
        bad = self.values[member] if bool(self.values[member].any()) else self.terms[member]
        one_is_to_blame = bool(bad.any()) and (len(bad) == 1 or not bool(bad.all()))
        return member, int(bad.nonzero()[0]) if one_is_to_blame else -1


class NotFinite(ArithmeticError):
    """A loss that is not finite."""

    def __init__(self, step: int, blame: Blame) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step, self.blame = step, blame


class Losses:
    """Sums losses and looks at each at once: before its gradient is followed."""

    def __init__(self, first: int) -> None:
        self.step, self.since, self.total = first, first, 0.0

    def add(self, loss: Tensor, batch: Batch, found: Loss) -> None:
        """Add the mean of the members' losses (M,).

        Raises
        ------
        NotFinite
            If it is not.
        """
        mean = float(loss.mean())
        if not math.isfinite(mean):
            raise NotFinite(self.step, Blame.of(loss, batch, found))
        self.total += mean

    def count(self) -> None:
        """Say that a step has been asked for."""
        self.step += 1

    def look(self) -> None:
        """Raise what `add` did not."""

    def take_mean(self) -> float:
        """Mean of the losses since the last call."""
        mean = self.total / (self.step - self.since)
        self.since, self.total = self.step, 0.0
        return mean


class LossesOnDevice(Losses):
    """The same for a host that runs ahead of its device: nothing waits for a number until `look`.

    ``add`` changes tensors alone, so that it may be part of a captured step.
    """

    def __init__(self, first: int, n_members: int, n_cells: int, device: torch.device) -> None:
        super().__init__(first)
        self.sum = torch.zeros((), dtype=accumulator(torch.zeros((), device=device)), device=device)
        self.number = torch.full((), first, dtype=torch.long, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.long, device=device)
        shapes = ((n_members,), (n_members, n_cells), (n_members, n_cells))
        self.blame = Blame(*(torch.zeros(shape, dtype=torch.bool, device=device) for shape in shapes))

    def add(self, loss: Tensor, batch: Batch, found: Loss) -> None:
        """Add the mean of the losses, and note the first step of which it is not finite."""
        mean = loss.mean()
        fresh = (self.first_bad < 0) & ~torch.isfinite(mean)
        self.first_bad.copy_(torch.where(fresh, self.number, self.first_bad))
        blame = Blame.of(loss, batch, found)
        for part in fields(Blame):
            own: Tensor = getattr(self.blame, part.name)
            own.copy_(torch.where(fresh, getattr(blame, part.name), own))
        self.sum += mean
        self.number += 1

    def look(self) -> None:
        """Wait for the device, and raise `NotFinite` if a loss since the last look was not."""
        first_bad = int(self.first_bad)
        if first_bad >= 0:
            raise NotFinite(first_bad, self.blame)

    def take_mean(self) -> float:
        """Mean of the losses since the last call; waits for the device."""
        self.total = float(self.sum)
        self.sum.zero_()
        return super().take_mean()
