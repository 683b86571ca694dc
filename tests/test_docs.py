"""Every command and every piece of Python of the how-to pages runs as written, one after the other in one folder.

But for two things: trainings end after a few steps, as how well the models do is not looked at here, and the program is
started from a process that has imported everything already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from programs import python
from warm_program import write_client

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/command-line.md", "docs/batch-scoring.md", "docs/tracking.md", "docs/images.md")
FEW_STEPS = 60
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def machines(n: int = 1200) -> pd.DataFrame:
    """A table like AI4I 2020: the same columns, made-up rows."""
    rng = np.random.default_rng(0)
    torque = rng.normal(40, 10, n).clip(5)
    frame = pd.DataFrame(
        {
            "UDI": np.arange(1, n + 1),
            "Product ID": [f"M{i}" for i in range(n)],
            "Type": rng.choice(["L", "M", "H"], n, p=[0.5, 0.3, 0.2]),
            "Air temperature [K]": rng.normal(300, 2, n).round(1),
            "Process temperature [K]": rng.normal(310, 1.5, n).round(1),
            "Rotational speed [rpm]": (1500 * (40 / torque) ** 0.3 + rng.normal(0, 50, n)).round().astype(int),
            "Torque [Nm]": torque.round(1),
            "Tool wear [min]": rng.integers(0, 250, n),
        }
    )
    failed = np.arange(n) % 40 == 0
    frame.loc[failed, "Torque [Nm]"] += 45
    frame["Machine failure"] = failed.astype(int)
    return frame.assign(TWF=0, HDF=0, PWF=failed.astype(int), OSF=0, RNF=0)


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of each block to run; `make` has tests of its own."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    kept = []
    for kind, text in found:
        if page == "README.md" and kind == "python":
            continue  # test_readme runs it, and looks at what it says
        lines = [line for line in text.splitlines() if not line.startswith("make ")]
        if any(lines):
            kept.append((kind, "\n".join(lines)))
    return kept


@contextmanager
def impatient_program(place: Path) -> Iterator[Path]:
    """A folder with an `anomaly-cvae` that adds a limit on steps to `train`, and need not import everything again."""
    # The address of a socket may have about 100 characters, a folder of pytest more.
    address, warm, own = Path(tempfile.mkdtemp()) / "socket", place / "warm", place / "anomaly-cvae"
    write_client(warm, address)
    own.write_text(
        f'#!/bin/bash\nif [ "$1" = train ]; then set -- "$@" --set max_steps={FEW_STEPS}; fi\nexec "{warm}" "$@"\n'
    )
    own.chmod(0o755)
    command = [sys.executable, Path(__file__).with_name("warm_program.py"), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield place
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which every page was followed, in their order."""
    place = tmp_path_factory.mktemp("docs")
    machines().to_csv(place / "ai4i2020.csv", index=False)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    with impatient_program(tmp_path_factory.mktemp("bin")) as program:
        environment |= {"PATH": f"{program}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}
        for page in PAGES:
            for kind, text in blocks(page):
                follow(page, kind, text, place, environment)
    return place


def follow(page: str, kind: str, text: str, place: Path, environment: dict[str, str]) -> None:
    """Do what one block says."""
    if kind == "yaml":
        (place / "pumps.yaml").write_text(text, encoding="utf-8")
        return
    if kind == "python":
        few = re.sub(r'("?max_steps"?[:=] ?)\d+', rf"\g<1>{FEW_STEPS}", text)
        ran = python("-c", few, folder=place, environment=environment)
    else:
        command = ["bash", "-euc", text]
        ran = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{page}:\n{text}\n{ran.stdout}\n{ran.stderr}"


def test_there_are_commands_on_every_page():
    for page in PAGES:
        assert any("anomaly-cvae" in text or "anomaly_cvae" in text for _, text in blocks(page)), page


def test_commands_leave_what_the_pages_say(folder):
    scored = pd.read_parquet(folder / "scored" / "ai4i2020.csv.parquet")
    assert len(scored) == 1200
    assert scored["UDI"].tolist() == [str(i) for i in range(1, 1201)]
    assert {"condition", "negative_elbo", "score", "threshold", "p_value", "is_anomaly"} <= set(scored)
    metadata = pq.read_schema(folder / "scored" / "ai4i2020.csv.parquet").metadata
    assert len(metadata[b"anomaly_cvae.model_sha256"]) == 64
    assert len(pd.read_csv(folder / "why.csv")) == 6
    assert len(pd.read_parquet(folder / "made_up.parquet")) == 1000
    for name in ("pumps", "pumps-fresh"):
        assert (folder / name / "manifest.json").is_file()
    assert (folder / "mlruns" / "mlflow.db").is_file()


def test_figures_of_the_pages_have_a_command():
    """Each page of figures names the command that wrote it, the day and the machine."""
    for page in (ROOT / "docs" / "benchmarks").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"Measured \d{4}-\d\d-\d\d by `make [a-z-]+", text), page
        assert "torch" in text, page
