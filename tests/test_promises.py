"""The benchmarks of promises: rates, explanations and missing cells; their statistics, and runs as a user runs them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from programs import BENCHMARKS, of_benchmarks, python


def run(program: str, *arguments: object, folder: Path) -> str:
    ran = python(BENCHMARKS / program, *arguments, folder=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five columns that say the same but for some noise; anomalies where one of them does not."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("sets")
    normal = rng.normal(size=(1600, 1)) + 0.1 * rng.normal(size=(1600, 5))
    apart = rng.normal(size=(100, 1)) + 0.1 * rng.normal(size=(100, 5))
    apart[:, 2] += 3.0
    np.savez(folder / "1_alike.npz", X=np.r_[normal, apart], y=np.r_[np.zeros(1600), np.ones(100)])
    return folder


def test_rates_of_fresh_rows_are_counted_and_judged(folder: Path, tmp_path: Path) -> None:
    asked = (folder, "--seeds", 0, "--fractions", 0.2, 0.4, "--results", "r.csv", "--output", "q.md")
    run("calibrated.py", *asked, folder=tmp_path)
    lines = pd.read_csv(tmp_path / "r.csv")
    alarms = lines[(lines["figure"] == "alarms") & (lines["fraction"] == 0.2)].set_index("asked")
    assert alarms["rows"].tolist() == [800, 800]
    assert alarms["calibration_rows"].tolist() == [160, 160]
    assert 0 <= alarms.loc[0.01, "counted"] < alarms.loc[0.05, "counted"] < 100
    found = lines[(lines["figure"] == "discoveries") & (lines["asked"] == 0.2)]
    assert found["value"].mean() > 0.9  # anomalies lie far off
    assert (found["counted"] <= found["rows"]).all()
    page = (tmp_path / "q.md").read_text(encoding="utf-8")
    assert "| alike | all | 160 | 800 |" in page
    assert "classes inside, 1% asked" in page
    assert "| 0.4 | 1.0000 |" in page
    assert "2 fits, 2 of them there already" in run("calibrated.py", *asked, folder=tmp_path)
    assert len(pd.read_csv(tmp_path / "r.csv")) == len(lines)


def test_the_law_of_counts_holds_for_exchangeable_scores() -> None:
    rng = np.random.default_rng(0)
    low, high = map(int, of_benchmarks("import calibrated_page as p; print(*p.bounds(199, 500, .05))")[0].split())
    scores = rng.normal(size=(4000, 699))
    # The tenth largest of 199: floor(0.05 * 200) = 10.
    counts = (scores[:, 199:] > np.sort(scores[:, :199], axis=1)[:, -10:-9]).sum(axis=1)
    inside = ((counts >= low) & (counts <= high)).mean()
    assert 0.945 < inside < 0.975
    assert (counts < low).mean() < 0.03
    assert (counts > high).mean() < 0.03


def test_verdicts_and_discoveries() -> None:
    said = of_benchmarks("""
import numpy as np, pandas as pd, calibrated, calibrated_page
def line(figure, guarantee, counted):
    return {"figure": figure, "guarantee": guarantee, "calibration_rows": 199, "rows": 500, "asked": .05,
            "counted": counted}
table = pd.DataFrame([line("alarms", "class", 25), line("alarms", "class", 90), line("p-values", "class", 0),
                      line("alarms", "pooled", 90), line("AUROC", "class", 0)])
print(calibrated_page.judged(table)["verdict"].tolist(), calibrated_page.bounds(50, 500, .01))
lines = list(calibrated.discoveries(np.linspace(.01, 1, 900), np.full(200, .001), "class", 0))
print(len(lines), {one.value for one in lines}, all(one.rows - one.counted == 100 for one in lines),
      max(one.counted for one in lines if one.asked == .05) <= 10)
none = list(calibrated.discoveries(np.linspace(.01, 1, 900), np.full(200, .5), "class", 0))
print({one.rows for one in none})
""")
    assert said == ["['inside', 'above', 'below', '', ''] (0, 0)", "30 {1.0} True True", "{0}"]


def test_spoiled_columns_are_found_by_those_who_know_the_others(folder: Path, tmp_path: Path) -> None:
    run("explained.py", folder, "--seeds", 0, "--results", "r.csv", "--output", "q.md", folder=tmp_path)
    lines = pd.read_csv(tmp_path / "r.csv")
    first = lines[lines["spoiled"] == 1].set_index("method")["found"]
    assert first['CVAE, explain(method="repair")'] > 0.9
    assert first["CVAE, repairs in turn"] == first['CVAE, explain(method="repair")']
    assert first["Gaussian given the others"] > 0.9
    assert first["z-score"] < 0.7
    assert lines["flagged_rows"].between(150, 200).all()
    page = (tmp_path / "q.md").read_text(encoding="utf-8")
    assert f"{first['z-score']:.3f}" in page
    assert "top-1 above the best peer (Gaussian given the others), all rows | >= 0.1 |" in page
    assert len(pd.read_csv(tmp_path / "explanations.csv")) == 9 * 3


def test_cells_are_spoiled_as_asked_and_blamed_by_definition() -> None:
    said = of_benchmarks("""
import numpy as np, attributions, explained
from sklearn.ensemble import IsolationForest
rng = np.random.default_rng(0)
pool = np.c_[rng.normal(size=(300, 3)), rng.integers(0, 2, 300)]
columns = explained.real_columns(pool)
rows = rng.normal(size=(100, 4))
spoiled, where = explained.spoil(rows, pool, columns, 2, rng)
places, cells = np.nonzero(where)
moves = np.abs([explained.rank(pool[:, d], spoiled[i, d]) - explained.rank(pool[:, d], rows[i, d])
                for i, d in zip(places, cells)])
print(columns, (where.sum(axis=1) == 2).all(), where[:, 3].any(), (spoiled == rows)[~where].all())
print(all(spoiled[i, d] in pool[:, d] for i, d in zip(places, cells)), moves.min() >= .25)
blame = np.array([[3., 1, 2], [0, 5, 1]])
print(explained.share_found(blame, np.array([[1, 0, 1], [1, 1, 0]], bool), 2))
x = rng.normal(size=(500, 1))
train = np.c_[x, x + .1 * rng.normal(size=(500, 1)), rng.normal(size=(500, 2))]
test = train[:3].copy(); test[:, 1] += 1.
for peer in ("Gaussian given the others", "kNN residual"):
    print((attributions.blame(peer, train, test, 0)[:, :2].min(axis=1) > 2).all())
far = np.full((1, 4), 0.) + [0, 0, 9, 0]
print(attributions.blame("z-score", train, far, 0).argmax(), attributions.shapley_of_forest(train, far, 0).argmax())
forest = IsolationForest(random_state=0).fit(train)
same = np.repeat(train[:1], 500, axis=0)
summed = attributions.shapley_of_forest(same, test, 0).sum(axis=1)
alone = IsolationForest(random_state=0).fit(same)
print(np.allclose(summed, -alone.score_samples(test) + alone.score_samples(same[:1])))
""")
    assert said == [
        "[0 1 2] True False True", "True True", "[1.  0.5]", "True", "True", "2 2", "True",
    ]  # fmt: skip


def test_missing_cells_cost_as_measured(folder: Path, tmp_path: Path) -> None:
    run("missing.py", folder, "--seeds", 0, "--results", "r.csv", "--output", "q.md", folder=tmp_path)
    lines = pd.read_csv(tmp_path / "r.csv")
    wide = lines.pivot_table(index="method", columns="share", values="roc_auc")
    assert wide.shape == (3 + 3 * 4, 4)
    assert wide.loc["CVAE, calibrated_score", 0.0] > 0.99
    # Two columns that are left say what the third should be; a mean says nothing.
    assert wide.loc["CVAE, negative ELBO", 0.3] > wide.loc["mean imputation, kNN", 0.3]
    assert (wide[0.0] > wide[0.5]).all()
    whole = wide[0.0][[name for name in wide.index if name.endswith(", GMM")]]
    assert whole.nunique() == 1  # nothing to impute
    page = (tmp_path / "q.md").read_text(encoding="utf-8")
    assert f"| alike | {wide.loc['CVAE, calibrated_score', 0.0]:.3f} |" in page
    assert "AUROC lost at 30% missing" in page


def test_cells_are_hidden_and_filled_as_said() -> None:
    said = of_benchmarks("""
import numpy as np, pandas as pd, imputers, missing
rng = np.random.default_rng(0)
hidden = missing.hide((20_000, 3), .5, rng)
print(hidden.all(axis=1).sum(), abs(hidden.mean() - .5 + .125 / 3) < .01, missing.hide((9, 2), 0., rng).any())
x = rng.normal(size=300)
train = pd.DataFrame({"word": rng.choice(["a", "b", "c"], 300), "x": x, "twice": 2 * x})
known, test, places = imputers.encoded(train, train.head(5))
print(places, known.shape, test[:, 2:].sum(axis=1))
holes = known[:5].copy(); holes[:, 1] = np.nan
for name, make in imputers.IMPUTERS.items():
    print(name, np.abs(make(known, 0).transform(holes)[:, 1] - known[:5, 1]).max() < .1)
""")
    assert said == [
        "0 True False", "[1 2 0 0 0] (300, 5) [1. 1. 1. 1. 1.]", "mean False", "kNN True", "iterative True",
    ]  # fmt: skip
