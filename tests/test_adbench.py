"""The benchmark of one-class detection on tables: its splits, its statistics, and a run as a user runs it."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from programs import BENCHMARKS, of_benchmarks, python

METHODS = ("--methods", "CVAE balanced", "kNN", "PCA")


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return python(BENCHMARKS / "adbench.py", *arguments, folder=folder)


def said_by(code: str) -> str:
    """What a piece of code says that imports the program's own parts."""
    return "\n".join(of_benchmarks(code)).strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets: rows on a line and some off it; normals that are correlated and anomalies that are not."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("sets")
    x = rng.normal(size=200)
    line = np.column_stack([x, x + 0.05 * rng.normal(size=200)])
    np.savez(folder / "1_line.npz", X=np.r_[line, rng.normal(size=(20, 2))], y=np.r_[np.zeros(200), np.ones(20)])
    far = rng.normal(size=(10, 3)) + 8
    np.savez(folder / "2_far.npz", X=np.r_[rng.normal(size=(100, 3)), far], y=np.r_[np.zeros(100), np.ones(10)])
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    published = pd.DataFrame(
        [("line", "theirs", 0.7, 0.6), ("far", "theirs", 0.9, 0.8), ("far", "partly", 1.0, 1.0)],
        columns=["dataset", "method", "auroc", "auprc"],
    )
    published.to_csv(place / "published.csv", index=False)
    ran = run(
        folder, *METHODS, "--seeds", 0, 1, "--results", "results.csv", "--output", "quality.md", "--workers", 1,
        "--published", "published.csv", folder=place,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return place


def test_every_line_is_measured_and_kept(finished: Path) -> None:
    table = pd.read_csv(finished / "results.csv")
    assert len(table) == 2 * 3 * 2
    assert table["roc_auc"].between(0, 1).all()
    assert (table[table["data"] == "far"]["roc_auc"] > 0.99).all()
    assert (table[(table["data"] == "line") & (table["method"] != "PCA")]["roc_auc"] > 0.8).all()
    assert set(table[table["data"] == "line"]["training_rows"]) == {100}
    assert set(table[table["data"] == "line"]["test_rows"]) == {120}


def test_the_page_has_means_differences_and_published_figures(finished: Path) -> None:
    page = (finished / "quality.md").read_text(encoding="utf-8")
    table = pd.read_csv(finished / "results.csv")
    mean = table.groupby(["method", "data"])["roc_auc"].mean().groupby("method").mean()
    assert f"| **CVAE balanced** | {mean['CVAE balanced']:.3f} |" in page
    assert f"| kNN | {mean['kNN']:.3f} |" in page
    assert "| theirs | 0.800 | 0.700 |" in page
    assert "partly" not in page  # it does not report every set
    assert "| CVAE balanced | kNN |" in page
    assert len(pd.read_csv(finished / "adbench.csv")) == 2 * 3


def test_finished_lines_are_not_measured_again(folder: Path, finished: Path) -> None:
    before = (finished / "results.csv").read_text()
    ran = run(
        folder, *METHODS, "--seeds", 0, 1, "--results", "results.csv", "--output", "quality.md", "--workers", 1,
        folder=finished,
    )  # fmt: skip
    assert ran.returncode == 0
    assert "12 lines, 12 of them there already" in ran.stdout
    assert (finished / "results.csv").read_text() == before


def test_a_method_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "3_tiny.npz", X=np.random.default_rng(0).normal(size=(9, 2)), y=np.r_[np.zeros(6), np.ones(3)])
    ran = run(
        tmp_path, "--methods", "kNN", "PCA", "--seeds", 0, "--results", "r.csv", "--output", "q.md", "--workers", 2,
        folder=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "tiny, kNN, seed 0: ValueError" in ran.stdout
    assert pd.read_csv(tmp_path / "r.csv")["method"].tolist() == ["PCA"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "nearest"], "no method 'nearest'; there are CVAE fast"),
        (["--only", "moon"], "holds no set 'moon'; there are line, far"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    ran = run(folder, *arguments, folder=tmp_path)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_splits_share_no_row_and_hold_every_anomaly() -> None:
    said = said_by("""
import numpy as np
from adbench import split
X, y = np.arange(101.0)[:, None], np.r_[np.zeros(81), np.ones(20)]
train, test, is_anomaly = split(X, y, 3)
print(len(train), len(test), is_anomaly.sum(), len(np.intersect1d(train, test)), (train < 81).all(),
      (test[is_anomaly] >= 81).all(), (split(X, y, 3)[0] == train).all(), (split(X, y, 4)[0] == train).all())
""")
    assert said == "40 61 20 0 True True True False"


def test_intervals_and_ranks_of_made_up_figures() -> None:
    said = said_by("""
import numpy as np, pandas as pd, ranking
rows = [(d, m, s, v) for d, values in {"a": (.9, .8, .7), "b": (.6, .6, .5), "c": (.8, .9, .1)}.items()
        for m, v in zip(("CVAE", "kNN", "PCA"), values) for s in (0, 1)]
table = pd.DataFrame(rows, columns=["data", "method", "seed", "roc_auc"]).assign(average_precision=.5, seconds=1.)
means = ranking.means(table).sort_index()
print(means["rank"].round(2).to_dict(), means["wins"].to_dict(), means["seeds"].tolist())
print([round(v, 3) for v in ranking.interval(np.full(22, .01))])
low = ranking.interval(np.r_[np.full(20, .01), -.5, -.4])
print(low[1] < low[0] < low[2])
""")
    assert said.splitlines() == [
        "{'CVAE': 1.5, 'PCA': 3.0, 'kNN': 1.5} {'CVAE': 2, 'PCA': 0, 'kNN': 2} [2, 2, 2]",
        "[0.01, 0.01, 0.01]",
        "True",
    ]


def test_only_methods_with_as_many_seeds_on_every_set_are_compared() -> None:
    said = said_by("""
import pandas as pd, ranking
rows = [("a", "x", 0), ("b", "x", 0), ("a", "y", 0), ("a", "z", 0), ("a", "z", 1), ("b", "z", 0)]
table = pd.DataFrame(rows, columns=["data", "method", "seed"])
print(sorted(ranking.complete(table)["method"].unique()))
""")
    assert said == "['x']"


def test_a_line_of_ours_with_other_parameters_is_measured_again(finished: Path) -> None:
    lines = pd.read_csv(finished / "results.csv", keep_default_na=False)
    assert (lines[lines["method"] == "kNN"]["parameters"] == "").all()
    stale = lines.assign(parameters=lines["parameters"].where(lines["method"] != "CVAE balanced", "00000000"))
    stale.to_csv(finished / "stale.csv", index=False)
    found = said_by(f"""
from pathlib import Path
from adbench import load
folder = Path({str(finished)!r})
print(sorted(load(folder / "stale.csv")["method"].unique()), len(load(folder / "results.csv")))
""")
    assert found == "['PCA', 'kNN'] 12"
