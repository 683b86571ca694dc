"""Scoring on this machine: files in, scored Parquet out; reading, scoring and writing overlap."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from anomaly_cvae.batch.backend import Backend, with_backend
from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.filters import Where
from anomaly_cvae.batch.manifest import Entry, Manifest, manifest_at, state_of
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.overlap import Stopwatch, Writer, ahead
from anomaly_cvae.batch.pictures import OnFault, refuse_picture
from anomaly_cvae.batch.places import Place, place_of
from anomaly_cvae.batch.results import FileResult, Progress, Summary
from anomaly_cvae.batch.sink import SCORED_TYPES, ScoredFile, add_counts, counts_by_class, partial_of, require_own
from anomaly_cvae.batch.source import find_files
from anomaly_cvae.batch.table_file import Batch, TableFile
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import AnomalyCVAEError, DataError, OutputError, ParameterError
from anomaly_cvae.fitted import require_contrast
from anomaly_cvae.inputs import nearest

__all__ = ["FileResult", "Progress", "ScoreOptions", "Summary", "score_files"]


@dataclass(frozen=True)
class ScoreOptions:
    """What a scored file holds, and what a bad input means.

    ``keep`` names input columns to copy; None: those that training ignored (identifiers, labels), where a
    file has them. ``where`` says which rows are scored, such as ``"machine == 'M' and rpm > 1200"``, and
    ``max_rows`` how many at most, in all files together. ``on_error``: "skip" goes on with the next file, "fail"
    stops at the first bad one. ``backend``: "torch", "onnx" (ONNX Runtime, on a CPU; scores agree within 1e-5), or
    "auto": the second where it is installed and there are enough rows for it to pay.
    """

    keep: tuple[str, ...] | None = None
    keep_all: bool = False
    contrast: bool = False
    top_column: bool = False
    on_error: Literal["skip", "fail"] = "skip"
    csv_format: CsvFormat = field(default_factory=CsvFormat)
    where: str | None = None
    max_rows: int | None = None
    backend: Backend = "auto"

    @property
    def scored_columns(self) -> list[str]:
        """Columns that the scored files get beside the kept ones."""
        left_out = {"contrast"} if not self.contrast else set()
        left_out |= {"top_column", "top_nats"} if not self.top_column else set()
        return [name for name in SCORED_TYPES if name not in left_out]


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

    Both may be URLs that fsspec or pyarrow knows, such as ``s3://bucket/folder``. A file appears when it is
    complete. Run again after a kill, the job goes on where it stopped; files that have not changed since, under
    the same model and options, are not scored again. What a file may have wrong with it (see `FileResult.error`)
    ends the job only with ``on_error="fail"``.

    Raises
    ------
    ConditionError
        If the contrast is asked for where there is none.
    DataError
        If there is no input, two inputs would become one file, or the output folder is among the inputs.
    ParameterError
        If the filter cannot be read, no file has the columns it names, or those that are to be kept.
    OutputError
        If the output cannot be written, or another job writes there; what is finished stays.
    """
    options, folder = options or ScoreOptions(), place_of(output)
    if options.contrast:
        require_contrast(detector.schema_)
    if options.max_rows is not None and options.max_rows < 1:
        raise ParameterError(f"max_rows must be at least 1, not {options.max_rows}")
    where = None if options.where is None else Where.parse(options.where)
    files = find_files(inputs, options.csv_format, called=Needs.of(detector).called)
    targets = _targets(files, inputs, folder)
    _require_kept(files, options)
    if where is not None:
        _require_filter(files, where)
    detector = with_backend(detector, options.backend, files, options.max_rows)
    job = _Job(detector, model_hash, options, where, on_progress, sum(map(_size, files)))
    with manifest_at(folder, job.identity) as manifest:
        results: list[FileResult] = []
        for file, target in zip(files, targets, strict=True):
            if job.left == 0:
                break
            results.append(job.score(file, target, manifest))
            if results[-1].status == "failed" and options.on_error == "fail":
                break
    not_opened = len(files) - len(results) if job.left == 0 else 0
    return Summary(results, time.perf_counter() - job.started, job.stopwatch.seconds, not_opened)


def _targets(files: list[TableFile], inputs: Sequence[str | Path], output: Place) -> list[Place]:
    resolved = output.resolve()
    for given in map(place_of, inputs):
        if (
            type(given) is type(output)
            and given.is_dir()
            and (resolved == given.resolve() or given.resolve() in resolved.parents)
        ):
            raise DataError(
                f"the output folder {output} lies in the input folder {given}: its files would be taken for inputs; "
                "choose a folder outside"
            )
    for file in files:
        if resolved in file.path.resolve().parents:
            raise DataError(f"the input {file.path} lies in the output folder {output}; choose another output folder")
    targets: dict[Place, Place] = {}
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


def _require_filter(files: list[TableFile], where: Where) -> None:
    """A filter that goes with no file is wrong: better said at once than for every file."""
    refused: ParameterError | None = None
    for file in files:
        try:
            return file.require_filter(where)
        except ParameterError as error:
            refused = refused or error
        except DataError:
            continue  # it is named when its turn comes
    if refused is not None:
        raise refused


class _Job:
    """One call of `score_files`."""

    def __init__(
        self,
        detector: CVAEDetector,
        model_hash: str,
        options: ScoreOptions,
        where: Where | None,
        on_progress: Callable[[Progress], None] | None,
        total_bytes: int,
    ) -> None:
        self.detector, self.options, self.where, self.on_progress = detector, options, where, on_progress
        self.model_hash, self.total_bytes = model_hash, max(total_bytes, 1)
        self.started, self.stopwatch = time.perf_counter(), Stopwatch()
        self.rows, self.bytes_done, self.bytes_skipped = 0, 0, 0
        self.left = options.max_rows
        self.needs, self.known = Needs.of(detector), frozenset(detector.schema_.class_names)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a scored file to stand."""
        from anomaly_cvae import __version__

        policies = ("score_kind", "unseen_class", "missing_condition")
        precision = self.detector.model_.engine.precision
        return {
            "model_sha256": self.model_hash,
            "library_version": __version__,
            "columns": self.options.scored_columns,
            "keep": "all" if self.options.keep_all else self.options.keep,
            "csv_format": asdict(self.options.csv_format),
            **{name: getattr(self.detector, name) for name in policies},
            **({} if self.where is None else {"where": self.where.text}),
            **({"precision": precision} if precision != "float32" else {}),
        }

    def score(self, file: TableFile, target: Place, manifest: Manifest) -> FileResult:
        """One file, from start to finish."""
        started, size = time.perf_counter(), _size(file)
        done = manifest.is_done(file.path, target)
        if done is not None and done.is_whole(self.left):
            self.bytes_done += size
            self.bytes_skipped += size
            self._count(done.rows)
            return _result(file, target, "unchanged", done)
        rows_before, faults = self.rows, dict[str, str]()
        with _output_faults_named(target):
            require_own(target)
            partial_of(target).unlink(missing_ok=True)  # of a job that was killed
        try:
            modified = _modified(file)
            classes, cut = self._score(file, target, size, self._on_fault(faults))
        except (ValueError, TypeError) as error:
            self.rows = rows_before
            with _output_faults_named(target):
                manifest.drop(file.path, target)
            return FileResult(file.path, target, "failed", seconds=time.perf_counter() - started, error=str(error))
        finally:
            self.bytes_done += size
        entry = Entry(
            output=str(target.relative_to(manifest.folder)),  # type: ignore[arg-type]  # of one file system
            size=size,
            modified_ns=modified,
            rows=self.rows - rows_before,
            classes=classes,
            seconds=round(time.perf_counter() - started, 3),
            faults=faults,
            cut=cut,
        )
        self._count(entry.rows)
        with _output_faults_named(target):
            manifest.add(file.path, entry)
        return _result(file, target, "scored", entry)

    def _count(self, rows: int) -> None:
        """Take finished rows off those that may be scored."""
        self.left = None if self.left is None else self.left - rows

    def _on_fault(self, faults: dict[str, str]) -> OnFault:
        """Notes pictures that cannot be used, unless the first of them is to end the job."""
        if self.options.on_error == "fail":
            return refuse_picture

        def note(path: Path, why: str) -> None:
            faults[str(path)] = why

        return note

    def _score(
        self, file: TableFile, target: Place, size: int, on_fault: OnFault
    ) -> tuple[dict[str, tuple[int, int]], bool]:
        """Rows and anomalies per class, and whether the limit cut the file off."""
        kept, totals = self._kept(file), dict[str, tuple[int, int]]()
        left, cut, first = self.left, False, True
        with _output_faults_named(target), ScoredFile(target, self._metadata(file)) as sink:
            with (
                Writer() as writer,
                closing(ahead(self.needs.batches(file, kept, on_fault, where=self.where), self.stopwatch)) as batches,
            ):
                for batch in batches:
                    if left == 0:
                        cut = True
                        break
                    if left is not None:
                        cut = len(batch.frame) > left
                        batch = batch.head(left)
                        left -= len(batch.frame)
                    if len(batch.frame) or first:  # one without rows gives the file its columns
                        scored = self.stopwatch.timed("score", partial(self._score_batch, file, batch))
                        writer.submit(partial(self._write, sink, batch, scored, totals))
                        self.rows, first = self.rows + len(scored), False
                    self._report(file, batch.done * size)
                    if cut:
                        break
            self.stopwatch.timed("write", sink.finish)
        return totals, cut

    def _write(self, sink: ScoredFile, batch: Batch, scored: pd.DataFrame, totals: dict[str, tuple[int, int]]) -> None:
        self.stopwatch.timed("write", partial(sink.write, batch.kept, scored))
        add_counts(totals, counts_by_class(scored, self.known))

    def _score_batch(self, file: TableFile, batch: Batch) -> pd.DataFrame:
        frame, options = self.needs.table(batch.frame), self.options
        try:
            scored = self.detector.score_table(frame, contrast=options.contrast, top_column=options.top_column)
        except (ValueError, TypeError) as error:
            raise DataError(f"{file.path}: {error}{_place_in_file(str(error), batch)}") from error
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
            **({} if self.detector.model_.engine.graphs is None else {"anomaly_cvae.backend": "onnx"}),
            **({} if self.where is None else {"anomaly_cvae.where": self.where.text}),
            **({} if self.left is None else {"anomaly_cvae.max_rows": str(self.left)}),
        }

    def _report(self, file: TableFile, bytes_of_file: float) -> None:
        if self.on_progress is None:
            return
        done = (self.bytes_done + bytes_of_file) / self.total_bytes
        if self.options.max_rows is not None:
            done = max(done, self.rows / self.options.max_rows)
        seconds, skipped = time.perf_counter() - self.started, self.bytes_skipped / self.total_bytes
        self.on_progress(Progress(file.path, self.rows, min(done, 1.0), seconds, skipped))


def _result(file: TableFile, target: Place, status: Literal["scored", "unchanged"], entry: Entry) -> FileResult:
    classes, faults = dict(entry.classes), dict(entry.faults)
    return FileResult(
        file.path, target, status, entry.rows, entry.anomalies, classes, entry.seconds, faults=faults, cut=entry.cut
    )


def _place_in_file(message: str, batch: Batch) -> str:
    """What to add to a message about a row of a batch, so that it is found in the file."""
    named = re.search(r"\brow (\d+)", message)
    if batch.rows is not None and named and int(named[1]) < len(batch.rows):
        return f" (that is row {batch.row(int(named[1])):,} of the file; rows left out are not counted)"
    return f" (rows counted from row {batch.start:,} of the file)" if batch.start else ""


def _size(file: TableFile) -> int:
    """Bytes; 0 for a file that is gone, which is found out when it is read."""
    return state_of(file.path)[0] if file.path.exists() else 0


def _modified(file: TableFile) -> int:
    try:
        return state_of(file.path)[1]
    except OSError as error:
        raise DataError(f"{file.path}: no such file; it was there when the job began") from error


class _output_faults_named:  # reads as a phrase after `with`
    """Turns a refusal of the disk into an `OutputError` that says what to do."""

    def __init__(self, target: Place) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, AnomalyCVAEError):
            raise OutputError(
                f"{self.target}: cannot be written ({error.strerror or error}); the finished files are kept: free some "
                "space, or make the folder writable, and run the same command again"
            ) from error
