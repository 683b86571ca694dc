"""Kill a scoring job again and again, start it anew each time, and compare what comes out: `make drill-kill`.

Each drill scores the same files with `anomaly-cvae score`. The process is killed (SIGKILL) at a random moment, twice,
and then left alone. The output must be, byte for byte, that of a job nobody disturbed, with nothing left beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from anomaly_cvae import CVAEDetector

FILES = 12
ROWS_PER_FILE = 60_000
KILLS_PER_DRILL = 2
COMMAND = [sys.executable, "-m", "anomaly_cvae.cli", "score", "model", "rows", "--output"]
OPTIONS = ["--keep", "id", "--quiet", "--no-tracking"]


def prepare(folder: Path) -> None:
    """A small model and a folder of Parquet and CSV files."""
    rng = np.random.default_rng(0)
    (folder / "rows").mkdir()
    for i in range(FILES):
        kind = rng.choice(["a", "b"], ROWS_PER_FILE)
        frame = pd.DataFrame({"id": np.arange(ROWS_PER_FILE) + i * ROWS_PER_FILE, "kind": kind})
        for name in ("x", "y", "z"):
            frame[name] = rng.normal(size=ROWS_PER_FILE) + (kind == "a")
        if i % 4:
            frame.to_parquet(folder / "rows" / f"part{i:02}.parquet", index=False)
        else:
            frame.to_csv(folder / "rows" / f"part{i:02}.csv", index=False)
    small = frame.head(2_000)
    detector = CVAEDetector(["kind"], ignore_columns=["id"], max_steps=200, hidden_dims=(64, 64), random_state=0)
    detector.fit(small).save(folder / "model")


def score(folder: Path, output: str) -> subprocess.Popen[bytes]:
    """A job, started."""
    return subprocess.Popen([*COMMAND, output, *OPTIONS], cwd=folder)


def contents(folder: Path) -> dict[str, str]:
    """Every file of an output folder by its hash; the manifest, which holds times, by what it lists."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ("_manifest.jsonl", ".lock"):
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def drill(folder: Path, output: str, seconds: float, rng: random.Random) -> list[int]:
    """Kill, resume, kill, resume; returns how many files were finished at each kill that came in time."""
    finished = []
    for _ in range(KILLS_PER_DRILL):
        job = score(folder, output)
        try:
            job.wait(timeout=rng.uniform(0.4, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            finished.append(len(list((folder / output).glob("*.parquet"))))
    if score(folder, output).wait():
        raise SystemExit("the resumed job failed")
    return finished


def main() -> None:
    """Run the drills and say how many came out right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, right, kills = random.Random(arguments.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        started = time.perf_counter()
        if score(folder, "undisturbed").wait():
            raise SystemExit("the undisturbed job failed")
        seconds = time.perf_counter() - started
        expected = contents(folder / "undisturbed")
        rows = sum(len(pd.read_parquet(file)) for file in (folder / "undisturbed").glob("*.parquet"))
        assert rows == FILES * ROWS_PER_FILE, rows
        print(f"undisturbed: {len(expected)} files, {rows:,} rows, {seconds:.1f} s", flush=True)
        for i in range(arguments.drills):
            finished = drill(folder, f"drill{i}", seconds, rng)
            same = contents(folder / f"drill{i}") == expected
            right, kills = right + same, kills + len(finished)
            print(
                f"drill {i + 1}: killed with {finished} files finished: {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(folder / f"drill{i}")
    print(f"{right} of {arguments.drills} identical after {kills} kills")
    if right < arguments.drills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
