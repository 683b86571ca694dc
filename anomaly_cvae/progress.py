"""How training shows itself: a progress bar where rich is installed, and scikit-learn's callbacks from 1.9 on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from anomaly_cvae.training import Epoch

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn before 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]  # the stand-in
        """Stands in where scikit-learn has no callbacks."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """Leave ``method`` as it is."""
        return method


__all__ = ["CallbackSupportMixin", "EpochReporter", "with_callbacks"]


class EpochReporter:
    """Passes epochs on to the progress bar and to the estimator's callbacks; a context manager."""

    def __init__(self, estimator: Any, X: Any, y: Any, *, max_steps: int, verbose: int) -> None:
        self.estimator, self.X, self.y, self.verbose, self.max_steps = estimator, X, y, verbose, max_steps
        self.context: Any = None
        self.epoch_context: Any = None
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> EpochReporter:
        if hasattr(self.estimator, "_init_callback_context"):
            self.context = self.estimator._init_callback_context(max_subtasks=None)
            self.context.call_on_fit_task_begin(estimator=self.estimator, X=self.X, y=self.y)
            self._begin_epoch()
        if self.verbose == 1:
            self.bar = _bar()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.max_steps, nats="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            if kind is None:
                self.bar.update(self.task, completed=self.max_steps, total=self.max_steps)
            self.bar.stop()
        if self.context is not None and kind is None:
            self.context.call_on_fit_task_end(estimator=self.estimator, X=self.X, y=self.y)

    def __call__(self, epoch: Epoch) -> bool:
        """Report one epoch; True when a callback asks to stop."""
        nats = f"held-out negative ELBO {epoch.validation_negative_elbo:.2f} nats"
        if self.bar is not None:
            self.bar.update(self.task, completed=epoch.step, nats=nats)
        elif self.verbose:
            print(f"step {epoch.step:>6} of {self.max_steps}: {nats}", file=sys.stderr)
        if self.context is None:
            return False
        stop = self.epoch_context.call_on_fit_task_end(estimator=self.estimator, X=self.X, y=self.y)
        self._begin_epoch()
        return bool(stop)

    def _begin_epoch(self) -> None:
        self.epoch_context = self.context.subcontext(task_name="epoch")
        self.epoch_context.call_on_fit_task_begin(estimator=self.estimator, X=self.X, y=self.y)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[nats]}"),
        console=Console(stderr=True),
    )
