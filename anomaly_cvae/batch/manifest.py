"""What a scoring job has done: read again after a kill, so that no row is lost and none is written twice.

A journal: the first line says under which model and options, every further one that a file is finished, or no
longer is. A line is added and synced at a time, so that a job of many files does not write their list over and over;
at a URL, where nothing can be added to a file, the whole journal is written now and then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anomaly_cvae.batch.pictures import pictures_below
from anomaly_cvae.batch.places import Place, RemotePath
from anomaly_cvae.batch.sink import PARTIAL, sync
from anomaly_cvae.errors import DataError, OutputError

NAME = "_manifest.jsonl"
LOCK = ".lock"
VERSION = 1
SECONDS_BETWEEN_WRITES = 2.0
"""Of a journal at a URL."""


@dataclass(frozen=True)
class Entry:
    """One finished file: what the input was when it was scored, and what came out.

    ``classes`` maps a class to its rows and anomalies; ``faults`` a picture that was left out to what is wrong with it.
    ``cut``: the file went on where the limit of the job was reached.
    """

    output: str
    size: int
    modified_ns: int
    rows: int
    classes: Mapping[str, tuple[int, int]]
    seconds: float
    faults: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False

    def is_whole(self, limit: int | None) -> bool:
        """Whether a job that may score ``limit`` more rows would make the same of it."""
        if limit is None:
            return not self.cut
        return self.rows == limit if self.cut else self.rows <= limit

    @property
    def anomalies(self) -> int:
        """Flagged rows, of all classes."""
        return sum(flagged for _, flagged in self.classes.values())


@dataclass
class Manifest:
    """The finished files of one output folder, under one model and one set of options.

    A context manager that holds the folder: two jobs must not write to it at once.
    """

    folder: Place
    identity: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    _lock: Any = None
    _journal: Any = None

    def __enter__(self) -> Self:
        self._hold()
        try:
            if not self._read():
                # Before any output: a kill must not leave files of this model under the name of another one.
                self._begin()
            self._continue()
            self.beside.unlink(missing_ok=True)
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

    @property
    def beside(self) -> Place:
        """Where a new journal is written before it takes its place."""
        return self.folder / f".{NAME}{PARTIAL}"

    @property
    def _here(self) -> Path:
        assert isinstance(self.folder, Path), "RemoteManifest is for other places"
        return self.folder

    def _hold(self) -> None:
        self._lock = _hold(self._here)

    def _continue(self) -> None:
        self._journal = (self._here / NAME).open("a", encoding="utf-8")

    def is_done(self, path: Place, output: Place) -> Entry | None:
        """The entry of an input that has not changed since it was scored, if its output is still there."""
        entry = self.entries.get(key_of(path))
        if entry is None or not path.exists() or (entry.size, entry.modified_ns) != state_of(path):
            return None
        return entry if self.folder / entry.output == output and output.is_file() else None

    def add(self, path: Place, entry: Entry) -> None:
        """Note a finished file, at once and for good."""
        self._take(key_of(path), entry)
        self._append({"file": key_of(path), **asdict(entry)})

    def drop(self, path: Place, output: Place) -> None:
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
        beside = self._here / self.beside.name
        try:
            beside.write_text(self._head(), encoding="utf-8")
            sync(beside)
            os.replace(beside, self._here / NAME)
        finally:
            beside.unlink(missing_ok=True)
        sync(self._here)

    def _head(self) -> str:
        return json.dumps({"version": VERSION, "identity": dict(self.identity)}) + "\n"

    def _mend(self, torn: str, text: str) -> None:
        """Take away a line that a kill cut off."""
        os.truncate(self._here / NAME, len(text.encode("utf-8")) - len(torn.encode("utf-8")))

    def _read(self) -> bool:
        """Take over what an earlier job with this model and these options has finished; False if none has."""
        path = self.folder / NAME
        if not path.is_file():
            return False
        try:
            with path.open("rb") as content:
                text = content.read().decode("utf-8")
            lines = text.split("\n")
            torn = lines.pop()  # empty, unless a kill came in the middle of a line
            if torn:
                self._mend(torn, text)
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


class RemoteManifest(Manifest):
    """The same at a URL, where nothing is locked: of two jobs at once, one may forget what the other has finished.

    Files finished in the last seconds before a kill may not be noted; they are scored again, to the same end.
    """

    _lines: list[str]
    _written = 0.0
    _behind = False

    @property
    def _there(self) -> RemotePath:
        beside = self.beside
        assert isinstance(beside, RemotePath)
        return beside

    def _hold(self) -> None:
        self._lines = [self._head()]
        self._there.parent.mkdir()

    def _begin(self) -> None:
        self._lines = [self._head()]
        self._write()

    def _continue(self) -> None:
        return None

    def _mend(self, torn: str, text: str) -> None:
        return None  # it is written anew with the next entry

    def _replay(self, line: dict[str, Any]) -> None:
        self._lines.append(json.dumps(line) + "\n")
        super()._replay(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(line) + "\n")
        self._behind = True
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        self._there.write_text("".join(self._lines))
        self._there.replace(self._there.with_name(NAME))
        self._written, self._behind = time.monotonic(), False

    def _release(self) -> None:
        if self._behind:
            self._write()


def manifest_at(folder: Place, identity: Mapping[str, Any]) -> Manifest:
    """The manifest of an output folder, wherever it is."""
    return Manifest(folder, identity) if isinstance(folder, Path) else RemoteManifest(folder, identity)


def state_of(path: Place) -> tuple[int, int]:
    """Bytes and time of the last change, ns: of a file, or of all pictures in a folder, and of its sub-folders.

    Raises
    ------
    OSError
        If there is nothing.
    """
    if not isinstance(path, Path) or not path.is_dir():
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    pictures = [picture.stat() for picture in pictures_below(path)]
    # A picture that is taken away, or brought with its old date, leaves its trace in the folder's.
    folders = [path, *(below for below in path.rglob("*") if below.is_dir())]
    changes = [*(stat.st_mtime_ns for stat in pictures), *(folder.stat().st_mtime_ns for folder in folders)]
    return sum(stat.st_size for stat in pictures), max(changes)


def key_of(path: Place) -> str:
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
