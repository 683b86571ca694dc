"""Where files lie: on this machine, or at an address that fsspec or pyarrow knows (``s3://``, ``gs://``, …).

A `RemotePath` does what a `pathlib.Path` does as far as reading, writing and listing tables goes, so that the rest of
the package need not tell them apart.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal
from urllib.parse import unquote

from anomaly_cvae.errors import AnomalyCVAEError, DataError, MissingDependencyError, OutputError

VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "created")
"""What file systems call that which changes when a file does, the surest first."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://(?:[^/@]*@(?![^/]*\.(?:dfs|blob)\.))?")
_HERE = re.compile(r"file://(?:localhost)?(?=/)", re.IGNORECASE)
_REMEDY = "check the address, the connection and that your credentials for it are set"


@dataclass(frozen=True)
class RemoteState:
    """Size in bytes, and a number that differs when the content does; under the names of `os.stat_result`."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL. ``url`` is what is shown: without password and query; ``key`` what fsspec takes."""

    url: str
    key: str = field(repr=False)
    filesystem: Any = field(repr=False, compare=False)

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """The place at ``url``.

        Raises
        ------
        MissingDependencyError
            If fsspec, or the package for this kind of address, is not installed.
        DataError
            If no package knows this kind of address, or it is not reached.
        """
        filesystem, key = _opened(url)
        return cls(shown(url).rstrip("/"), str(key).rstrip("/") or str(key), filesystem)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, below: str | Path) -> RemotePath:
        part = below if isinstance(below, str) else below.as_posix()
        return RemotePath(f"{self.url}/{part}", f"{self.key.rstrip('/')}/{part}", self.filesystem)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """As of a `Path`."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """As of a `Path`."""
        return PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> RemotePath:
        """The folder it lies in; the root of the file system is its own."""
        above = self.url.rsplit("/", 1)[0]
        if above.endswith("/"):  # of the two after the scheme
            return self
        return RemotePath(above, self.key.rsplit("/", 1)[0], self.filesystem)

    @property
    def parents(self) -> list[RemotePath]:
        """All folders it lies in."""
        above = self.parent
        return [] if above == self else [above, *above.parents]

    def with_name(self, name: str) -> RemotePath:
        """Another file in the same folder."""
        return self.parent / name

    def resolve(self) -> RemotePath:
        """Itself: an address is absolute."""
        return self

    def relative_to(self, folder: RemotePath | Path) -> Path:
        """Its place below ``folder``."""
        return Path(PurePosixPath(self.url).relative_to(PurePosixPath(str(folder))))

    def exists(self) -> bool:
        """Whether something is there."""
        with self._reading():
            return bool(self.filesystem.exists(self.key))

    def is_file(self) -> bool:
        """Whether a file is there."""
        with self._reading():
            return bool(self.filesystem.isfile(self.key))

    def is_dir(self) -> bool:
        """Whether a folder is there: files with this beginning."""
        with self._reading():
            return bool(self.filesystem.isdir(self.key))

    def stat(self) -> RemoteState:
        """What tells whether the file has changed; raises `FileNotFoundError` if it is gone."""
        with self._reading():
            info = self.filesystem.info(self.key)
        version = next((str(info[name]) for name in VERSIONS if info.get(name) is not None), "")
        return RemoteState(int(info.get("size") or 0), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16))

    def open(self, mode: Literal["rb"] = "rb", *, ranges: bool = False) -> io.BufferedReader:
        """The file to be read; with ``ranges`` no byte but those asked for, without read-ahead."""
        with self._reading():
            caching = {"cache_type": "none"} if ranges else {}
            content: Any = self.filesystem.open(self.key, mode, **caching)
            # memory:// hands everybody the same open file, which has one position.
            own: Any = io.BytesIO(content.getvalue()) if self.url.startswith("memory:") else content
            reader: io.BufferedReader = own
            return reader

    def create(self) -> IO[bytes]:
        """The file to be written, in the place of any other."""
        with self.writing():
            content: IO[bytes] = self.filesystem.open(self.key, "wb")
            return content

    def read_text(self) -> str:
        """The whole file, which is UTF-8."""
        with self._reading():
            return bytes(self.filesystem.cat_file(self.key)).decode("utf-8")

    def write_text(self, text: str) -> None:
        """A file with this content, UTF-8."""
        with self.writing():
            self.filesystem.pipe_file(self.key, text.encode("utf-8"))

    def mkdir(self) -> None:
        """The folder, with those above it, where the file system has folders."""
        with self.writing():
            self.filesystem.makedirs(self.key, exist_ok=True)

    def replace(self, target: RemotePath) -> None:
        """Move the file to ``target``, in the place of any other."""
        with self.writing():
            self.filesystem.mv(self.key, target.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        with self.writing():
            if not missing_ok or self.filesystem.exists(self.key):
                self.filesystem.rm_file(self.key)

    def files(self) -> list[RemotePath]:
        """Every file below this folder, by name."""
        with self._reading():
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(self.key)
        return sorted((self._below(key) for key in found), key=str)

    def matches(self) -> list[RemotePath]:
        """Files and folders that this pattern names, by name; raises nothing if there is none."""
        with self._reading():
            self.filesystem.invalidate_cache()
            found = self.filesystem.glob(self.key)
        fixed = self.fixed()
        return sorted((fixed._below(key) for key in found), key=str)

    def is_pattern(self) -> bool:
        """Whether the name holds marks that stand for others."""
        return any(mark in self.url for mark in "*?[")

    def fixed(self) -> RemotePath:
        """The folder above the first part of a pattern that is not fixed."""
        place = self
        while place.is_pattern():
            place = place.parent
        return place

    def _below(self, key: str) -> RemotePath:
        """A file by the name that the file system gave it."""
        relative = str(key).removeprefix(self.key).lstrip("/")
        return RemotePath(f"{self.url}/{relative}" if relative else self.url, str(key), self.filesystem)

    def _why(self, error: Exception) -> str:
        return _reason(error).replace(self.key, self.url)  # the key may have a signature

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Every file system has exceptions of its own."""
        try:
            yield
        except (AnomalyCVAEError, FileNotFoundError):
            raise
        except Exception as error:
            raise DataError(f"{self.url}: cannot be read ({self._why(error)}); {_REMEDY}") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns whatever is raised into an `OutputError` that names the URL and what to check."""
        try:
            yield
        except AnomalyCVAEError:
            raise
        except Exception as error:
            raise OutputError(f"{self.url}: cannot be written ({self._why(error)}); {_REMEDY}") from error


Place = Path | RemotePath


def is_url(given: str | Path | RemotePath) -> bool:
    """Whether this is an address that is not of this machine's own files; ``file://`` is."""
    return isinstance(given, RemotePath) or (
        isinstance(given, str) and bool(_URL.match(given)) and not _HERE.match(given)
    )


def place_of(given: str | Path | RemotePath) -> Place:
    """What a user names.

    Raises
    ------
    DataError, MissingDependencyError
        As `RemotePath.of` does.
    """
    if isinstance(given, (Path, RemotePath)):
        return given
    if is_url(given):
        return RemotePath.of(given)
    here = _HERE.match(given)
    return Path(unquote(given[here.end() :])) if here else Path(given)


def shown(given: str | Path | RemotePath) -> str:
    """What may stand in a message, a log or a run: without a password or a signature in the query."""
    text = str(given)
    scheme = _URL.match(text) if is_url(given) else None
    if scheme is None:
        return text
    rest = text[scheme.end() :]
    return f"{scheme[1]}://{rest.split('?')[0] if scheme[1].lower().startswith('http') else rest}"


def _opened(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # type: ignore[import-untyped]  # it has no types
    except ImportError as error:
        raise MissingDependencyError(f"{shown(url)}: files at URLs need fsspec: pip install fsspec") from error
    try:
        filesystem, key = fsspec.core.url_to_fs(url)
        return filesystem, str(key)
    except ImportError as error:
        return _of_pyarrow(url, error)
    except Exception as error:
        raise DataError(f"{shown(url)}: cannot be opened ({_reason(error)}); {_REMEDY}") from error


def _of_pyarrow(url: str, missing: ImportError) -> tuple[Any, str]:
    """Where fsspec's package for a kind of address is not installed, pyarrow may know it by itself."""
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]  # as above
    from pyarrow import fs

    try:
        filesystem, key = fs.FileSystem.from_uri(url)
    except (ValueError, NotImplementedError) as error:
        raise MissingDependencyError(f"{shown(url)}: {missing}") from error
    except OSError as error:
        raise DataError(f"{shown(url)}: cannot be reached ({_reason(error)}); {_REMEDY}") from error
    return ArrowFSWrapper(filesystem), str(key)


def _reason(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
