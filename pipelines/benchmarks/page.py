"""Pages of figures: sections that are measured, and replaced, one by one."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

TITLE = """# Speed

Every figure is measured beside the machine's own limit and beside its peers in one run: all lines of a table take
turns, round by round, so a busy machine slows them alike. Ratios are formed within a round; a figure is the median over
rounds and, in brackets, the least and the most. Rows are noise, networks hardly trained: what scoring costs does not
depend on either. The lines share a process: the freed memory that our engine has it keep serves peers, too. A goal that
is not met says so. `make bench-throughput` measures every section but *GPU*, which `make bench-gpu` measures where
there is a CUDA device.
"""
ORDER = ("Limits and scoring", "Where the time goes", "Peers", "Growth", "Memory and files", "Start-up", "GPU")


@dataclass(frozen=True)
class Goal:
    """A figure to reach, and what was measured in every round; none where it cannot be measured here."""

    what: str
    measured: np.ndarray | None
    goal: float
    unit: str = " x"
    at_most: bool = False
    why_not: str = "not measured"

    def line(self) -> str:
        """A row of a table: what, goal, measured, verdict."""
        goal = f"{'<=' if self.at_most else '>='} {self.goal:g}{self.unit}"
        if self.measured is None:
            return f"| {self.what} | {goal} | {self.why_not} | |"
        middle = float(np.median(self.measured))
        reached = middle <= self.goal if self.at_most else middle >= self.goal
        return (
            f"| {self.what} | {goal} | {spread(self.measured, self.unit)} | {'reached' if reached else '**missed**'} |"
        )


def goal_table(goals: Sequence[Goal]) -> list[str]:
    """Goals beside what was measured."""
    if not goals:
        return []
    return ["| figure | goal | measured | |", "|---|---|---|---|", *(goal.line() for goal in goals), ""]


def spread(values: np.ndarray, unit: str = "") -> str:
    """Median (least to most)."""
    values = np.asarray(values, dtype=float)
    middle = f"{_number(float(np.median(values)))}{unit}"
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(float(values.min()))} to {_number(float(values.max()))})"


def _number(value: float) -> str:
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def measured_on(command: str) -> str:
    """Date, hardware and versions, for the head of a section."""
    packages = ("torch", "numpy", "pandas", "scikit-learn", "pyarrow", "pyod")
    versions = ", ".join(f"{name} {found}" for name in packages if (found := installed(name)))
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} by `{command}` on {cpu_name()} ({platform.machine()}), "
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}; {versions}, "
        f"Python {platform.python_version()}."
    )


def installed(package: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_section(
    path: Path, heading: str, lines: Sequence[str], *, title: str = TITLE, order: Sequence[str] = ORDER
) -> None:
    """Replace one section of the page, of speed unless said otherwise; the others stay as they were measured."""
    sections = _sections(path)
    sections[heading] = "\n".join(lines).strip()
    known = [name for name in order if name in sections]
    every = known + [name for name in sections if name not in known]
    text = title + "".join(f"\n## {name}\n\n{sections[name]}\n" for name in every)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _sections(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    found = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return found[0].split(":", 1)[1].strip() if found else platform.processor()
