"""Inputs and outputs at URLs: the same scores, whole files or none, and messages that name the address."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch

from anomaly_cvae import CVAEDetector
from anomaly_cvae.batch import ScoreOptions, Summary, find_files, score_files
from anomaly_cvae.batch.places import RemotePath, is_url, place_of, shown
from anomaly_cvae.errors import DataError, MissingDependencyError, OutputError

fsspec = pytest.importorskip("fsspec", reason="files at URLs need fsspec")

HASH = "0" * 64
TINY = {"max_steps": 60, "hidden_dims": (16,), "n_estimators": 1, "random_state": 0, "device": "cpu"}


class BucketError(Exception):
    """What a storage's own client raises: no OSError."""


def _memory() -> type:
    from fsspec.implementations.memory import MemoryFileSystem

    return MemoryFileSystem


class Counted(io.BytesIO):
    """Notes how many bytes are read."""

    read_bytes = 0

    def read(self, *arguments: Any) -> bytes:
        got = super().read(*arguments)
        Counted.read_bytes += len(got)
        return got

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        Counted.read_bytes += got
        return got


class CountedFileSystem(_memory()):
    """Memory that notes what is read."""

    protocol = ("counted",)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = super()._open(path, mode, **options)
        return Counted(opened.getvalue()) if mode == "rb" else opened


class FaultyFileSystem(_memory()):
    """A bucket that refuses to be read (``faulty://secret/…``), or to take a file whose name has a ``b``."""

    protocol = ("faulty",)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "secret" in path and mode == "rb":
            raise BucketError("Access Denied")
        opened = super()._open(path, mode, **options)
        if mode == "wb" and ".b." in path:

            def refuse(content: Any) -> int:
                raise BucketError("Quota exceeded")

            opened.write = refuse
        return opened


@pytest.fixture(autouse=True)
def filesystems() -> Iterator[None]:
    for kind in (CountedFileSystem, FaultyFileSystem):
        fsspec.register_implementation(kind.protocol[0], kind, clobber=True)
    yield
    _memory().store.clear()
    _memory().pseudo_dirs[:] = [""]


def rows(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.choice(["007", "042"], n)
    return pd.DataFrame({"id": np.arange(n), "kind": kind, "x": rng.normal(size=n), "n": rng.poisson(3, n)})


@pytest.fixture(scope="module")
def detector() -> CVAEDetector:
    return CVAEDetector(["kind"], ignore_columns=["id"], **TINY).fit(rows(300))


def as_bytes(frame: pd.DataFrame, name: str) -> bytes:
    if name.endswith(".parquet"):
        return frame.to_parquet()
    if name.endswith(".arrow"):
        table, sink = pa.Table.from_pandas(frame, preserve_index=False), io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
        return sink.getvalue()
    text = frame.to_csv(index=False).encode()
    return gzip.compress(text) if name.endswith(".gz") else text


def put(url: str, content: bytes) -> str:
    with fsspec.open(url, "wb") as target:
        target.write(content)
    return url


def table_at(url: str) -> pa.Table:
    with fsspec.open(url, "rb") as content:
        return pq.read_table(io.BytesIO(content.read()))


def score(detector: CVAEDetector, inputs: Any, out: Any, **options: Any) -> Summary:
    paths = inputs if isinstance(inputs, list) else [inputs]
    return score_files(detector, paths, out, model_hash=HASH, options=ScoreOptions(**options))


def statuses(summary: Summary) -> dict[str, str]:
    return {file.path.name: file.status for file in summary.files}


def names_at(url: str) -> list[str]:
    filesystem, key = fsspec.core.url_to_fs(url)
    return sorted(path.rsplit("/", 1)[-1] for path in filesystem.find(key))


# ---------------------------------------------------------------------- addresses


def test_address_is_told_from_a_path():
    assert is_url("s3://bucket/a.parquet")
    assert is_url("memory://a")
    for path in ("a.parquet", "/a/b", "C:\\a", "C:/a", "a:b", Path("s3://a"), "file:///a/b.parquet"):
        assert not is_url(path), path
    assert place_of("file:///a%20b/c.parquet") == Path("/a b/c.parquet")
    assert place_of("file://localhost/a") == Path("/a")


def test_what_is_shown_has_no_password_and_no_signature():
    assert shown("https://me:pass@host.org/a/b.csv?sig=abc") == "https://host.org/a/b.csv"
    assert shown("sftp://me:pass@host/a.csv") == "sftp://host/a.csv"
    assert shown("abfs://box@account.dfs.core.windows.net/a.csv") == "abfs://box@account.dfs.core.windows.net/a.csv"
    assert shown("s3://bucket/a?.csv") == "s3://bucket/a?.csv"
    assert shown("a@b?c") == "a@b?c"


def test_remote_path_has_the_parts_that_a_path_has():
    place = RemotePath.of("memory://in/part/a.csv.gz")
    assert (place.name, place.suffix, place.suffixes) == ("a.csv.gz", ".gz", [".csv", ".gz"])
    assert str(place.parent) == "memory://in/part"
    assert [str(above) for above in place.parents] == ["memory://in/part", "memory://in"]
    assert place.parent / "b.csv" == place.with_name("b.csv")
    assert place.relative_to(RemotePath.of("memory://in")) == Path("part/a.csv.gz")


def test_files_below_an_address_are_found_in_the_order_of_names():
    for name in ("b.csv", "part/a.parquet", "_books/c.csv", ".hidden.csv", "notes.docx", "a.arrow"):
        put(f"memory://in/{name}", b"x")
    found = [(str(file.path), str(file.relative)) for file in find_files("memory://in")]
    assert found == [
        ("memory://in/a.arrow", "a.arrow"), ("memory://in/b.csv", "b.csv"),
        ("memory://in/part/a.parquet", "part/a.parquet"),
    ]  # fmt: skip
    assert [str(file.path) for file in find_files("memory://in/*.csv")] == ["memory://in/b.csv"]
    assert [str(file.relative) for file in find_files("memory://in/p*")] == ["part/a.parquet"]
    assert len(find_files(["memory://in", "memory://in/b.csv"])) == 3


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("memory://nowhere/a.csv", "no such file"),
        ("memory://nowhere", "no such file"),
        ("memory://nowhere/*.csv", "no table found"),
        ("nonsense://a/b.csv", "cannot be opened"),
        ("memory://in/a.docx", "convert it"),
        ("memory://in/a.png", "of this machine only"),
        ("faulty://secret/a.parquet", "Access Denied"),
    ],
)
def test_address_that_is_not_readable_is_named_with_the_reason(detector, tmp_path, url, part):
    for name in ("memory://in/a.docx", "memory://in/a.png", "faulty://secret/a.parquet"):
        put(name, b"x" * 100)
    try:
        (failed,) = score(detector, url, tmp_path / "out").failed
        said = failed.error
    except DataError as error:
        said = str(error)
    assert url in said
    assert part in said


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match="pip install fsspec"):
        find_files("memory://in/a.csv")


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.csv.gz", "a.arrow"])
def test_scores_of_a_file_at_an_address_are_those_of_the_file_here(detector, tmp_path, name):
    content = as_bytes(rows(200, seed=1), name)
    (tmp_path / name).write_bytes(content)
    (here,) = score(detector, tmp_path / name, tmp_path / "here", where="id > 20").files
    (there,) = score(detector, put(f"memory://in/{name}", content), tmp_path / "there", where="id > 20").files
    assert there.status == "scored", there.error
    assert pq.read_table(there.output).equals(pq.read_table(here.output))
    again = score(detector, f"memory://in/{name}", tmp_path / "there", where="id > 20")
    assert statuses(again) == {name: "unchanged"}
    put(f"memory://in/{name}", as_bytes(rows(200, seed=2), name))
    assert statuses(score(detector, f"memory://in/{name}", tmp_path / "there", where="id > 20")) == {name: "scored"}


def test_file_address_is_the_file_here(detector, tmp_path):
    (tmp_path / "a b.parquet").write_bytes(as_bytes(rows(50), "a.parquet"))
    summary = score(detector, (tmp_path / "a b.parquet").as_uri(), (tmp_path / "out").as_uri())
    assert summary.files[0].output == tmp_path / "out" / "a b.parquet"
    assert summary.rows == 50


def test_no_more_of_a_parquet_file_is_read_than_is_needed(detector, tmp_path):
    rng = np.random.default_rng(0)
    frame = rows(80_000).assign(**{f"other {i}": rng.normal(size=80_000) for i in range(20)})
    content = frame.to_parquet(row_group_size=20_000)
    put("counted://in/a.parquet", content)
    Counted.read_bytes = 0
    summary = score(detector, "counted://in/a.parquet", tmp_path / "out")
    assert summary.rows == 80_000
    assert 0 < Counted.read_bytes < len(content) / 4
    Counted.read_bytes, whole = 0, Counted.read_bytes
    assert score(detector, "counted://in/a.parquet", tmp_path / "out", where="id >= 60000").rows == 20_000
    assert Counted.read_bytes < whole * 0.7


def test_broken_file_at_an_address_is_named_among_good_ones(detector, tmp_path):
    put("memory://in/a.parquet", as_bytes(rows(20), "a.parquet"))
    put("memory://in/b.parquet", as_bytes(rows(20), "a.parquet")[:500])
    put("memory://in/c.csv", b"")
    put("memory://in/d.csv", as_bytes(rows(20).drop(columns="x"), "d.csv"))
    summary = score(detector, "memory://in", tmp_path / "out")
    assert list(statuses(summary).values()) == ["scored", "failed", "failed", "failed"]
    for file in summary.failed:
        assert str(file.path) in file.error


# ---------------------------------------------------------------------- outputs


def test_output_at_an_address_is_that_of_a_folder_and_is_resumed(detector, tmp_path):
    for i, name in enumerate(("a.parquet", "part/b.csv")):
        put(f"memory://in/{name}", as_bytes(rows(100, seed=i), name))
    score(detector, "memory://in", tmp_path / "here")
    summary = score(detector, "memory://in", "memory://out/scored")
    assert [str(file.output) for file in summary.files] == [
        "memory://out/scored/a.parquet", "memory://out/scored/part/b.csv.parquet",
    ]  # fmt: skip
    for file in summary.files:
        here = pq.read_table(tmp_path / "here" / file.output.relative_to(RemotePath.of("memory://out/scored")))
        assert table_at(str(file.output)).equals(here, check_metadata=True)
    assert names_at("memory://out") == ["_manifest.jsonl", "a.parquet", "b.csv.parquet"]
    assert set(statuses(score(detector, "memory://in", "memory://out/scored")).values()) == {"unchanged"}
    put("memory://in/a.parquet", as_bytes(rows(110), "a.parquet"))
    again = score(detector, "memory://in", "memory://out/scored")
    assert statuses(again) == {"a.parquet": "scored", "b.csv": "unchanged"}
    assert len(table_at("memory://out/scored/a.parquet")) == 110
    assert set(statuses(score(detector, "memory://in", "memory://out/scored", contrast=True)).values()) == {"scored"}


def test_deleted_output_at_an_address_is_made_again(detector):
    put("memory://in/a.parquet", as_bytes(rows(20), "a.parquet"))
    score(detector, "memory://in", "memory://out")
    fsspec.filesystem("memory").rm_file("/out/a.parquet")
    assert statuses(score(detector, "memory://in", "memory://out")) == {"a.parquet": "scored"}


def test_somebody_elses_file_at_an_address_is_not_replaced(detector):
    put("memory://in/a.parquet", as_bytes(rows(20), "a.parquet"))
    content = put("memory://out/a.parquet", as_bytes(rows(3), "a.parquet"))
    with pytest.raises(OutputError, match="no scored file"):
        score(detector, "memory://in", "memory://out")
    assert len(table_at(content)) == 3


def test_address_that_takes_no_file_is_an_output_error_and_no_part_is_seen(detector):
    for name in ("a", "b", "c"):
        put(f"memory://in/{name}.parquet", as_bytes(rows(20), "a.parquet"))
    with pytest.raises(OutputError, match=r"faulty://out/b\.parquet") as refused:
        score(detector, "memory://in", "faulty://out")
    assert "Quota exceeded" in str(refused.value)
    assert names_at("faulty://out") == ["_manifest.jsonl", "a.parquet"]
    with fsspec.open("faulty://out/_manifest.jsonl") as content:
        noted = [json.loads(line) for line in content.read().splitlines()]
    assert [line["output"] for line in noted[1:]] == ["a.parquet"]


def test_output_below_the_input_address_is_refused(detector):
    put("memory://in/a.parquet", as_bytes(rows(20), "a.parquet"))
    for out in ("memory://in", "memory://in/scored"):
        with pytest.raises(DataError, match="lies in the"):
            score(detector, "memory://in", out)
    score(detector, "memory://in/a.parquet", "memory://inner")  # begins alike, lies elsewhere


# ---------------------------------------------------------------------- killed, interrupted, out of space


def job(detector: CVAEDetector, folder: str, out: str, report: Path, limit: int | None) -> None:
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        report.write_text("started")
        score(detector, folder, out)
        report.write_text("done")
    except KeyboardInterrupt:
        report.write_text("interrupted")
    except OutputError as error:
        report.write_text(f"OutputError {error}")


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts `job` in a fresh process; ``local://`` is a real address that survives it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anomaly_cvae.batch", "pyarrow.parquet", "pytest", "fsspec.implementations.local"])

    def start(detector: CVAEDetector, folder: Path, out: Path, report: Path, limit: int | None = None) -> Any:
        arguments = (detector, f"local://{folder}", f"local://{out}", report, limit)
        process = context.Process(target=job, args=arguments)
        process.start()
        return process

    return start


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def contents(out: Path) -> dict[str, pa.Table]:
    return {path.name: pq.read_table(path) for path in sorted(out.glob("*.parquet"))}


def many(folder: Path, n: int) -> Path:
    folder.mkdir()
    for seed in range(n):
        rows(6000, seed).to_parquet(folder / f"{seed:02d}.parquet")
    return folder


def test_killed_job_at_an_address_is_resumed_to_the_same_end(detector, tmp_path, start):
    folder, out, report = many(tmp_path / "in", 20), tmp_path / "out", tmp_path / "report"
    score(detector, f"local://{folder}", tmp_path / "whole")
    rng, kills = np.random.default_rng(int(time.time())), 0
    for number in (0, 5, 10):
        process = start(detector, folder, out, report)
        wait_for((out / f"{number:02}.parquet").exists)
        time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert {len(table) for table in contents(out).values()} <= {6000}
    assert kills, "every job ended before its kill: the test tests nothing"
    score(detector, f"local://{folder}", f"local://{out}")
    expected, got = contents(tmp_path / "whole"), contents(out)
    assert list(got) == list(expected)
    assert all(got[name].equals(table, check_metadata=True) for name, table in expected.items())
    assert sorted({path.name for path in out.iterdir()} - set(got)) == ["_manifest.jsonl"]


def test_ctrl_c_at_an_address_notes_the_finished_files(detector, tmp_path, start):
    folder, report = many(tmp_path / "in", 20), tmp_path / "report"
    # An interrupt that arrives while Python tidies up a weak reference is lost; so it would be in any program.
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        process = start(detector, folder, out, report)
        wait_for(lambda out=out: (out / "02.parquet").exists())
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        if report.read_text() == "interrupted":
            break
    assert report.read_text() == "interrupted"
    finished = contents(out)
    assert 3 <= len(finished) < 20
    assert [path.name for path in out.iterdir() if path.name.endswith(".partial")] == []
    again = list(statuses(score(detector, f"local://{folder}", f"local://{out}")).values())
    assert again.count("unchanged") >= len(finished) - 1


def test_full_disk_at_an_address_is_an_output_error_that_keeps_finished_files(detector, tmp_path, start):
    folder, out, report = tmp_path / "in", tmp_path / "out", tmp_path / "report"
    folder.mkdir()
    for name, n in (("a", 50), ("b", 20_000), ("c", 50)):
        rows(n).to_parquet(folder / f"{name}.parquet")
    start(detector, folder, out, report, 100_000).join(60)
    assert report.read_text().startswith("OutputError")
    assert f"local://{out}/b.parquet" in report.read_text()
    assert list(contents(out)) == ["a.parquet"]
    assert sorted(path.name for path in out.iterdir()) == ["_manifest.jsonl", "a.parquet"]
    assert statuses(score(detector, f"local://{folder}", f"local://{out}")) == {
        "a.parquet": "unchanged", "b.parquet": "scored", "c.parquet": "scored",
    }  # fmt: skip
