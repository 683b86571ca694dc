"""What the studies on images share: their command line, their models, their figures, pictures and runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from anomaly_cvae import CVAEDetector, metrics, tracking

FIGURES = "figures.json"


@dataclass
class Study:
    """One study: a folder of its own for models, pictures and figures, and one MLflow run at the end.

    ``preset`` is "fast" (minutes on two cores) or "best". A model that was trained before, with the same
    parameters, is read from the folder; an interrupted training goes on where it stood.
    """

    name: str
    preset: str
    output: Path
    random_state: int
    track: bool
    rows: int | None = None
    steps: int | None = None
    console: Console = field(default_factory=Console)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_fast(self) -> bool:
        """Whether minutes are all there is."""
        return self.preset == "fast"

    def fitted(self, name: str, parameters: Mapping[str, Any], X: Any, condition: Any = None) -> CVAEDetector:
        """The detector called ``name``: read if it was trained before with these parameters, else trained."""
        folder, described = self.output / name, _described({**parameters, "random_state": self.random_state}, X)
        noted = folder.with_name(f".{name}.json")
        if folder.exists() and noted.is_file() and json.loads(noted.read_text())["parameters"] == described:
            self.seconds[name] = json.loads(noted.read_text())["seconds"]
            self.console.print(f"[dim]{name}: trained before, read from {folder}[/dim]")
            return CVAEDetector.load(folder)
        self.console.print(f"[bold]{name}[/bold]: training on {len(X):,} rows")
        self.output.mkdir(parents=True, exist_ok=True)
        progress = self.output / f".{name}.checkpoint"
        detector = CVAEDetector(**parameters, checkpoint=progress, random_state=self.random_state, verbose=1)
        started = time.perf_counter()
        detector.fit(X, condition=condition)
        self.seconds[name] = time.perf_counter() - started
        if detector.history_.attrs["stopped_by"] == "interrupt":
            self.console.print(f"{name}: interrupted; the same command goes on from {progress}")
            raise SystemExit(130)
        detector.save(folder)
        noted.write_text(json.dumps({"parameters": described, "seconds": self.seconds[name]}))
        progress.unlink(missing_ok=True)
        return detector

    def figure(self, what: str, value: float, unit: str, goal: str, note: str = "") -> None:
        """Note one measured number beside the goal it is held against, and say it."""
        self.figures[what] = {"value": float(value), "unit": unit, "goal": goal, "note": note}
        self.console.print(f"  {what}: [bold]{value:.4g}[/bold] {unit}  (goal {goal}){'; ' + note if note else ''}")
        self.write(finished=False)  # hours may lie between two figures: what is measured is not to be lost

    def picture(self, name: str, drawn: Figure) -> None:
        """Write a picture to the folder, and keep it for the run."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.pictures[name] = drawn
        drawn.savefig(self.output / f"{name}.png", dpi=110)

    def finish(self, detector: CVAEDetector, evaluation: metrics.Evaluation | None = None) -> None:
        """Write the figures, log the run with the model in the end chosen, and say what to open."""
        written = self.write(finished=True)
        if self.track:
            tracking.use_store(self.name)
            extras = tracking.Extras(figures=self.pictures, seconds=self.seconds, parameters={"preset": self.preset})
            with tracking.start_run(f"{self.name}, {self.preset}", {"job": "study", "data": self.name}):
                tracking.log_detector(detector, evaluation, extras)
                tracking.log_numbers({_metric(name): figure["value"] for name, figure in self.figures.items()})
        self.console.rule("[bold]What to open next")
        for name in self.pictures:
            self.console.print(f"  {self.output / f'{name}.png'}")
        self.console.print(f"  {written}")
        if self.track:
            self.console.print("  make ui: the run in MLflow, at http://127.0.0.1:5000 ('Model training', top left)")

    def write(self, *, finished: bool) -> Path:
        """The figures so far, with where and when they were measured, as JSON."""
        about = {
            "study": self.name,
            "preset": self.preset,
            "rows": self.rows,
            "date": date.today().isoformat(),
            "machine": machine(),
            "seconds": {name: round(seconds) for name, seconds in self.seconds.items()},
        }
        self.output.mkdir(parents=True, exist_ok=True)
        written = self.output / FIGURES
        written.write_text(json.dumps({**about, "finished": finished, "figures": self.figures}, indent=1) + "\n")
        return written


def study(
    name: str, description: str, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[Study, Any]:
    """The study that the command line asks for, and all of its arguments."""
    parser = argparse.ArgumentParser(description=description)
    if add is not None:
        add(parser)
    parser.add_argument("--preset", choices=("fast", "best"), default="fast", help="fast: minutes on two cores")
    parser.add_argument("--output", type=Path, help=f"folder of models and pictures; default: outputs/{name}/PRESET")
    parser.add_argument("--rows", type=int, help="train on so many rows only")
    parser.add_argument("--steps", type=int, help="train every model for so many steps")
    parser.add_argument("--random-state", type=int, default=0)
    parser.add_argument("--no-tracking", action="store_true", help="write files only, no MLflow run")
    given = parser.parse_args()
    output = given.output or Path("outputs") / name / given.preset
    return Study(name, given.preset, output, given.random_state, not given.no_tracking, given.rows, given.steps), given


def machine() -> str:
    """Hardware and versions, for beside a number."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}, Python {platform.python_version()}"


def _described(parameters: Mapping[str, Any], X: Any) -> str:
    """Parameters and rows, so that a model of others is not taken for this one."""
    cells = np.asarray(X) if isinstance(X, np.ndarray) else np.zeros(0)
    rows = [len(X), hashlib.sha256(np.ascontiguousarray(cells[:1000])).hexdigest()[:12]]
    return json.dumps({"rows": rows, **parameters}, sort_keys=True, default=str)


def _metric(name: str) -> str:
    return tracking.metric_name("figure", name)
