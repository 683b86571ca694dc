"""What a scoring job has done: read again after a kill, so that no row is lost and none is written twice.

A journal: the first line says under which model and options, every further one that a file is finished, or no
longer is. A line is added and synced at a time, so that a job of many files does not write their list over and over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anomaly_cvae.batch.pictures import pictures_below
from anomaly_cvae.batch.sink import PARTIAL, sync
from anomaly_cvae.errors import DataError, OutputError

NAME = "_manifest.jsonl"
LOCK = ".lock"
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One finished file: what the input was when it was scored, and what came out.

    ``classes`` maps a class to its rows and anomalies; ``faults`` a picture that was left out to what is wrong with it.
    """

    output: str
    size: int
    modified_ns: int
    rows: int
    classes: Mapping[str, tuple[int, int]]
    seconds: float
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def anomalies(self) -> int:
        """Flagged rows, of all classes."""
        return sum(flagged for _, flagged in self.classes.values())


@dataclass
class Manifest:
    """The finished files of one output folder, under one model and one set of options.

    A context manager that holds the folder: two jobs must not write to it at once.
    """

    folder: Path
    identity: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    _lock: Any = None
    _journal: Any = None

    def __enter__(self) -> Self:
        self._lock = _hold(self.folder)
        try:
            if not self._read():
                # Before any output: a kill must not leave files of this model under the name of another one.
                self._begin()
            self._journal = (self.folder / NAME).open("a", encoding="utf-8")
            (self.folder / f".{NAME}{PARTIAL}").unlink(missing_ok=True)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        for held in (self._journal, self._lock):
            if held is not None:
                held.close()
        self._journal = self._lock = None

    def is_done(self, path: Path, output: Path) -> Entry | None:
        """The entry of an input that has not changed since it was scored, if its output is still there."""
        entry = self.entries.get(key_of(path))
        if entry is None or not path.exists() or (entry.size, entry.modified_ns) != state_of(path):
            return None
        return entry if self.folder / entry.output == output and output.is_file() else None

    def add(self, path: Path, entry: Entry) -> None:
        """Note a finished file, at once and for good."""
        self._take(key_of(path), entry)
        self._append({"file": key_of(path), **asdict(entry)})

    def drop(self, path: Path, output: Path) -> None:
        """Forget an input that can no longer be scored, with what an earlier job made of it."""
        output.unlink(missing_ok=True)
        if self.entries.pop(key_of(path), None) is not None:
            self._append({"dropped": key_of(path)})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _begin(self) -> None:
        """A new journal in the place of any other."""
        beside = self.folder / f".{NAME}{PARTIAL}"
        try:
            head = {"version": VERSION, "identity": dict(self.identity)}
            beside.write_text(json.dumps(head) + "\n", encoding="utf-8")
            sync(beside)
            os.replace(beside, self.folder / NAME)
        finally:
            beside.unlink(missing_ok=True)
        sync(self.folder)

    def _read(self) -> bool:
        """Take over what an earlier job with this model and these options has finished; False if none has."""
        path = self.folder / NAME
        if not path.is_file():
            return False
        try:
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")
            torn = lines.pop()  # empty, unless a kill came in the middle of a line
            if torn:
                os.truncate(path, len(text.encode("utf-8")) - len(torn.encode("utf-8")))
            head = json.loads(lines[0])
            if head["version"] != VERSION or head["identity"] != json.loads(json.dumps(dict(self.identity))):
                return False
            for line in map(json.loads, lines[1:]):
                self._replay(line)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path} is not readable ({error}); delete it to have every file scored again, or choose another folder"
            ) from error
        return True

    def _replay(self, line: dict[str, Any]) -> None:
        if "dropped" in line:
            self.entries.pop(line["dropped"], None)
            return
        name = line.pop("file")
        self._take(name, Entry(**{**line, "classes": {c: (n, a) for c, (n, a) in line["classes"].items()}}))

    def _take(self, name: str, entry: Entry) -> None:
        """One output is of one input: of the last that was written there."""
        others = [other for other, known in self.entries.items() if known.output == entry.output]
        for other in others:
            del self.entries[other]
        self.entries[name] = entry


def state_of(path: Path) -> tuple[int, int]:
    """Bytes and time of the last change, ns: of a file, or of all pictures in a folder, and of its sub-folders.

    Raises
    ------
    OSError
        If there is nothing.
    """
    if not path.is_dir():
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    pictures = [picture.stat() for picture in pictures_below(path)]
    # A picture that is taken away, or brought with its old date, leaves its trace in the folder's.
    folders = [path, *(below for below in path.rglob("*") if below.is_dir())]
    changes = [*(stat.st_mtime_ns for stat in pictures), *(folder.stat().st_mtime_ns for folder in folders)]
    return sum(stat.st_size for stat in pictures), max(changes)


def key_of(path: Path) -> str:
    """The name under which an input stands in the manifest."""
    return str(path.resolve())


def _hold(folder: Path) -> Any:
    """An open lock file in ``folder``; the operating system frees it when this process ends, however it ends.

    Raises
    ------
    OutputError
        If the folder cannot be written to, or another job holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror}); choose another output folder") from error
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the folder is not guarded there
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise OutputError(f"{folder}: another job is writing there; wait for it, or choose another folder") from error
    return lock
