"""What a scoring job says: how far it is, what became of each file, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from anomaly_cvae.batch.places import Place

Status = Literal["scored", "unchanged", "failed"]


@dataclass(frozen=True)
class FileResult:
    """What became of one input: ``classes`` maps a class to its rows and anomalies.

    ``faults`` maps a picture of a folder that could not be used to what is wrong with it; the others are scored.
    ``cut``: the limit on rows was reached in it, and what follows there is not scored.
    """

    path: Place
    output: Place
    status: Status
    rows: int = 0
    anomalies: int = 0
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    faults: dict[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True)
class Summary:
    """A finished job: its files, and the seconds that each stage was at work (they overlap).

    ``not_opened`` counts the files after the one in which the limit on rows was reached.
    """

    files: list[FileResult]
    seconds: float
    stages: dict[str, float]
    not_opened: int = 0

    @property
    def limited(self) -> bool:
        """Whether the limit on rows kept some from being scored."""
        return self.not_opened > 0 or any(file.cut for file in self.files)

    @property
    def rows_per_second(self) -> float:
        """Rows scored by this job, over all its seconds."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def slowest(self) -> tuple[str, float]:
        """The stage that was at work longest, and its share of the job's seconds: what to make faster first."""
        stage = max(self.stages, key=lambda name: self.stages[name])
        return stage, min(self.stages[stage] / max(self.seconds, 1e-9), 1.0)

    @property
    def failed(self) -> list[FileResult]:
        """Inputs that could not be scored."""
        return [file for file in self.files if file.status == "failed"]

    @property
    def rows(self) -> int:
        """Rows scored by this job, without those of unchanged files."""
        return sum(file.rows for file in self.files if file.status == "scored")

    @property
    def classes(self) -> pd.DataFrame:
        """Rows and anomalies per class, of all files that stand in the output folder."""
        totals: dict[str, np.ndarray] = {}
        for file in self.files:
            for name, counts in file.classes.items():
                totals[name] = totals.get(name, np.zeros(2, dtype=np.int64)) + np.array(counts)
        table = pd.DataFrame(
            [(name, int(n), int(a), a / n if n else 0.0) for name, (n, a) in sorted(totals.items())],
            columns=["class", "rows", "anomalies", "share"],
        )
        return table.set_index("class")


@dataclass(frozen=True)
class Progress:
    """How far a job is: rows scored by it, share of the bytes done, seconds since its start.

    ``skipped`` is the share that an earlier job had done: it says nothing of the speed.
    """

    path: Place
    rows: int
    done: float
    seconds: float
    skipped: float = 0.0

    @property
    def seconds_left(self) -> float:
        """As it went so far; infinite while nothing is done."""
        own = self.done - self.skipped
        return self.seconds * (1.0 - self.done) / own if own > 0 else float("inf")

    @property
    def rows_per_second(self) -> float:
        """Since the start."""
        return self.rows / max(self.seconds, 1e-9)
