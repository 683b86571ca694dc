"""Scoring on this machine: files in, scored Parquet out; reading, scoring and writing overlap."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.manifest import Entry, Manifest, state_of
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.pictures import OnFault, refuse_picture
from anomaly_cvae.batch.sink import SCORED_TYPES, ScoredFile, counts_by_class, partial_of, require_own
from anomaly_cvae.batch.source import Batch, TableFile, find_files
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import AnomalyCVAEError, DataError, OutputError, ParameterError
from anomaly_cvae.fitted import require_contrast
from anomaly_cvae.inputs import nearest

AHEAD = 2
"""Batches that are read before they are needed."""

Status = Literal["scored", "unchanged", "failed"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ScoreOptions:
    """What a scored file holds, and what a bad input means.

    ``keep`` names input columns to copy; None: those that training ignored (identifiers, labels), where a
    file has them. ``on_error``: "skip" goes on with the next file, "fail" stops at the first bad one.
    """

    keep: tuple[str, ...] | None = None
    keep_all: bool = False
    contrast: bool = False
    top_column: bool = False
    on_error: Literal["skip", "fail"] = "skip"
    csv_format: CsvFormat = field(default_factory=CsvFormat)

    @property
    def scored_columns(self) -> list[str]:
        """Columns that the scored files get beside the kept ones."""
        left_out = {"contrast"} if not self.contrast else set()
        left_out |= {"top_column", "top_nats"} if not self.top_column else set()
        return [name for name in SCORED_TYPES if name not in left_out]


@dataclass(frozen=True)
class FileResult:
    """What became of one input: ``classes`` maps a class to its rows and anomalies.

    ``faults`` maps a picture of a folder that could not be used to what is wrong with it; the others are scored.
    """

    path: Path
    output: Path
    status: Status
    rows: int = 0
    anomalies: int = 0
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    faults: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A finished job: its files, and the seconds that each stage was at work (they overlap)."""

    files: list[FileResult]
    seconds: float
    stages: dict[str, float]

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
    """How far a job is: rows scored by it, share of the bytes done, seconds since its start."""

    path: Path
    rows: int
    done: float
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Since the start."""
        return self.rows / max(self.seconds, 1e-9)


class Stopwatch:
    """Seconds per stage; each stage runs in one thread."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "score": 0.0, "write": 0.0}

    def timed(self, stage: str, work: Callable[[], Item]) -> Item:
        """Do the work and add its seconds to the stage."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] += time.perf_counter() - started


def score_files(
    detector: CVAEDetector,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    model_hash: str,
    options: ScoreOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Score every table found at ``inputs`` into the folder ``output``, one Parquet file per input.

    A file appears when it is complete. Run again after a kill, the job goes on where it stopped; files that
    have not changed since, under the same model and options, are not scored again. What a file may have
    wrong with it (see `FileResult.error`) ends the job only with ``on_error="fail"``.

    Raises
    ------
    ConditionError
        If the contrast is asked for where there is none.
    DataError
        If there is no input, two inputs would become one file, or the output folder is among the inputs.
    OutputError
        If the output cannot be written, or another job writes there; what is finished stays.
    """
    options, output = options or ScoreOptions(), Path(output)
    if options.contrast:
        require_contrast(detector.schema_)
    files = find_files(inputs, options.csv_format, called=Needs.of(detector).called)
    targets = _targets(files, inputs, output)
    _require_kept(files, options)
    job = _Job(detector, model_hash, options, on_progress, sum(map(_size, files)))
    with Manifest(output, job.identity) as manifest:
        results = []
        for file, target in zip(files, targets, strict=True):
            results.append(job.score(file, target, manifest))
            if results[-1].status == "failed" and options.on_error == "fail":
                break
    return Summary(results, time.perf_counter() - job.started, job.stopwatch.seconds)


def _targets(files: list[TableFile], inputs: Sequence[str | Path], output: Path) -> list[Path]:
    resolved = output.resolve()
    for given in map(Path, inputs):
        if given.is_dir() and (resolved == given.resolve() or given.resolve() in resolved.parents):
            raise DataError(
                f"the output folder {output} lies in the input folder {given}: its files would be taken for inputs; "
                "choose a folder outside"
            )
    for file in files:
        if resolved in file.path.resolve().parents:
            raise DataError(f"the input {file.path} lies in the output folder {output}; choose another output folder")
    targets: dict[Path, Path] = {}
    for file in files:
        name = file.relative.with_suffix(".parquet") if file.kind == "parquet" else Path(f"{file.relative}.parquet")
        if output / name in targets:
            raise DataError(
                f"{targets[output / name]} and {file.path} would both become {output / name}; score them into "
                "different folders"
            )
        targets[output / name] = file.path
    return list(targets)


def _require_kept(files: list[TableFile], options: ScoreOptions) -> None:
    """A column to keep that no file has is misspelt: better said at once than for every file."""
    if not options.keep:
        return
    there: list[str] = []
    for file in files:
        try:
            there = file.columns()
        except DataError:
            continue  # it is named when its turn comes
        if set(options.keep) <= set(there):
            return
    absent = [name for name in options.keep if name not in there]
    if there and absent:
        raise ParameterError(f"keep: the tables have no column {absent[0]!r}{nearest(absent[0], there)}")


class _Job:
    """One call of `score_files`."""

    def __init__(
        self,
        detector: CVAEDetector,
        model_hash: str,
        options: ScoreOptions,
        on_progress: Callable[[Progress], None] | None,
        total_bytes: int,
    ) -> None:
        self.detector, self.options, self.on_progress = detector, options, on_progress
        self.model_hash, self.total_bytes = model_hash, max(total_bytes, 1)
        self.started, self.stopwatch = time.perf_counter(), Stopwatch()
        self.rows, self.bytes_done = 0, 0
        self.needs, self.known = Needs.of(detector), frozenset(detector.schema_.class_names)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a scored file to stand."""
        from anomaly_cvae import __version__

        policies = ("score_kind", "unseen_class", "missing_condition")
        return {
            "model_sha256": self.model_hash,
            "library_version": __version__,
            "columns": self.options.scored_columns,
            "keep": "all" if self.options.keep_all else self.options.keep,
            "csv_format": asdict(self.options.csv_format),
            **{name: getattr(self.detector, name) for name in policies},
        }

    def score(self, file: TableFile, target: Path, manifest: Manifest) -> FileResult:
        """One file, from start to finish."""
        started, size = time.perf_counter(), _size(file)
        done = manifest.is_done(file.path, target)
        if done is not None:
            self.bytes_done += size
            return FileResult(
                file.path, target, "unchanged", done.rows, done.anomalies, dict(done.classes), faults=dict(done.faults)
            )
        rows_before, faults = self.rows, dict[str, str]()
        with _output_faults_named(target):
            require_own(target)
            partial_of(target).unlink(missing_ok=True)  # of a job that was killed
        try:
            modified = _modified(file)
            classes = self._score(file, target, size, self._on_fault(faults))
        except (ValueError, TypeError) as error:
            self.rows = rows_before
            with _output_faults_named(target):
                manifest.drop(file.path, target)
            return FileResult(file.path, target, "failed", seconds=time.perf_counter() - started, error=str(error))
        finally:
            self.bytes_done += size
        entry = Entry(
            output=str(target.relative_to(manifest.folder)),
            size=size,
            modified_ns=modified,
            rows=self.rows - rows_before,
            classes=classes,
            seconds=round(time.perf_counter() - started, 3),
            faults=faults,
        )
        with _output_faults_named(target):
            manifest.add(file.path, entry)
        return FileResult(
            file.path, target, "scored", entry.rows, entry.anomalies, classes, entry.seconds, faults=faults
        )

    def _on_fault(self, faults: dict[str, str]) -> OnFault:
        """Notes pictures that cannot be used, unless the first of them is to end the job."""
        if self.options.on_error == "fail":
            return refuse_picture

        def note(path: Path, why: str) -> None:
            faults[str(path)] = why

        return note

    def _score(self, file: TableFile, target: Path, size: int, on_fault: OnFault) -> dict[str, tuple[int, int]]:
        kept = self._kept(file)
        totals: dict[str, tuple[int, int]] = {}
        with (
            _output_faults_named(target),
            ScoredFile(target, self._metadata(file)) as sink,
            Writer() as writer,
            closing(ahead(self.needs.batches(file, kept, on_fault), self.stopwatch)) as batches,
        ):
            for batch in batches:
                scored = self.stopwatch.timed("score", partial(self._score_batch, file, batch))
                for name, (n, flagged) in counts_by_class(scored, self.known).items():
                    before = totals.get(name, (0, 0))
                    totals[name] = (before[0] + n, before[1] + flagged)
                writer.submit(partial(self.stopwatch.timed, "write", partial(sink.write, batch.kept, scored)))
                self.rows += len(scored)
                self._report(file, batch.done * size)
        return totals

    def _score_batch(self, file: TableFile, batch: Batch) -> pd.DataFrame:
        frame, options = self.needs.table(batch.frame), self.options
        try:
            scored = self.detector.score_table(frame, contrast=options.contrast, top_column=options.top_column)
        except (ValueError, TypeError) as error:
            since = f" (rows counted from row {batch.start:,} of the file)" if batch.start else ""
            raise DataError(f"{file.path}: {error}{since}") from error
        return scored[self.options.scored_columns]

    def _kept(self, file: TableFile) -> list[str]:
        there = file.columns()
        if self.options.keep_all:
            kept = [name for name in there if file.kind not in ("pictures", "npz") or name not in self.needs.images]
        elif self.options.keep is None and file.kind in ("pictures", "npz"):
            own = {*self.needs.images, *self.options.scored_columns}
            kept = [name for name in there if name not in own]
        elif self.options.keep is None:
            kept = [name for name in there if name in self.needs.ignored]
        else:
            kept = list(dict.fromkeys(self.options.keep))
        clash = [name for name in kept if name in self.options.scored_columns]
        if clash:
            raise ParameterError(
                f"{file.path}: the kept column {clash[0]!r} has the name of a scored column; rename it, or name the "
                "columns to keep without it"
            )
        return kept

    def _metadata(self, file: TableFile) -> dict[str, str]:
        from anomaly_cvae import __version__

        calibration = self.detector.thresholds_
        return {
            "anomaly_cvae.model_sha256": self.model_hash,
            "anomaly_cvae.version": __version__,
            "anomaly_cvae.score_kind": self.detector.score_kind,
            "anomaly_cvae.thresholds_set_at": str(calibration["set_at"].iloc[0]),
            "anomaly_cvae.thresholds_rule": str(calibration["rule"].iloc[0]),
            "anomaly_cvae.input": file.path.name,
        }

    def _report(self, file: TableFile, bytes_of_file: float) -> None:
        if self.on_progress is None:
            return
        done = (self.bytes_done + bytes_of_file) / self.total_bytes
        self.on_progress(Progress(file.path, self.rows, min(done, 1.0), time.perf_counter() - self.started))


def _size(file: TableFile) -> int:
    """Bytes; 0 for a file that is gone, which is found out when it is read."""
    return state_of(file.path)[0] if file.path.exists() else 0


def _modified(file: TableFile) -> int:
    try:
        return state_of(file.path)[1]
    except OSError as error:
        raise DataError(f"{file.path}: no such file; it was there when the job began") from error


class Writer:
    """Runs one piece of work at a time in a thread of its own; at most one waits."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "write")
        self.last: Future[object] | None = None

    def __enter__(self) -> Writer:
        return self

    def submit(self, work: Callable[[], object]) -> None:
        """Hand over work once the last piece is done; an error of that one is raised here."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(work)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.pool.shutdown(wait=True)
        if kind is None and self.last is not None:
            self.last.result()


def ahead(items: Iterator[Item], stopwatch: Stopwatch) -> Generator[Item]:
    """The same items, read in a thread of their own before they are needed."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            while not stop.is_set():
                item = stopwatch.timed("read", lambda: next(items, None))
                put(item, None)
                if item is None:
                    return
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=read, name="read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()


class _output_faults_named:  # reads as a phrase after `with`
    """Turns a refusal of the disk into an `OutputError` that says what to do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, AnomalyCVAEError):
            raise OutputError(
                f"{self.target}: cannot be written ({error.strerror or error}); the finished files are kept: free some "
                "space, or make the folder writable, and run the same command again"
            ) from error
