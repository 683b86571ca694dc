"""The benchmark of detection given a condition: made-up rows, splits, peers, goals, and a run as a user runs it."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from programs import BENCHMARKS, of_benchmarks, python

QUICK = ("--only", "AI4I", "C-MAPSS FD002", "correlations, wrong class", "--methods", "GMM(10)", "Gaussian contrast",
         "--seeds", "0", "1")  # fmt: skip


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return python(BENCHMARKS / "contextual.py", *arguments, folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines whose sensors rise with wear as they do, far more, from regime to regime; nothing else."""
    folder = tmp_path_factory.mktemp("data") / "tabular"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rul = np.tile(np.arange(200, 0, -5), 40)
    regime = rng.integers(0, 2, 1600)
    cycles = pd.DataFrame({"unit": np.repeat(np.arange(40), 40), "rul": rul, "op_condition": regime})
    for number in range(1, 22):
        cycles[f"sensor_{number:02}"] = 10.0 * regime + (rul <= 75) + 0.3 * rng.normal(size=1600)
    cycles.to_parquet(folder / "cmapss_FD002_train.parquet")
    return folder.parent


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    ran = run(folder, "--parts", "de", *QUICK, "--results", "r.csv", "--output", "quality.md", folder=place)
    assert ran.returncode == 0, ran.stderr
    return place


def test_every_line_is_measured_and_kept(finished: Path) -> None:
    table = pd.read_csv(finished / "r.csv")
    # Two sets, a mixture in three ways; a contrast on the one with wrong claims; two seeds.
    assert len(table) == (2 * 3 + 1) * 2
    assert table["roc_auc"].between(0.45, 1).all()
    engines = table[table["data"] == "C-MAPSS FD002"]
    assert (engines[engines["way"] != "no condition"]["roc_auc"] > 0.99).all()
    wrong = table[table["data"].str.endswith("wrong class")]
    assert wrong[wrong["way"] == "no condition"]["roc_auc"].between(0.46, 0.54).all()
    assert (wrong[wrong["way"] == "given the class"]["roc_auc"] > 0.9).all()


def test_the_page_has_the_means_and_the_csv_every_line(finished: Path) -> None:
    page = (finished / "quality.md").read_text(encoding="utf-8")
    table = pd.read_csv(finished / "r.csv")
    line = table[(table["data"] == "correlations, wrong class") & (table["method"] == "Gaussian contrast")]
    assert f"| Gaussian contrast | given the class | contrast | **{line['roc_auc'].mean():.4f}**" in page
    assert page.startswith("# Quality")
    assert "## Tables and images with a condition" in page
    assert "### (f)" not in page
    kept = pd.read_csv(finished / "contextual.csv")
    assert len(kept) == len(table)


def test_finished_lines_are_not_measured_again_and_absent_files_are_named(folder: Path, finished: Path) -> None:
    before = (finished / "r.csv").read_text()
    ran = run(folder, "--parts", "cde", *QUICK, "--results", "r.csv", "--output", "q.md", folder=finished)
    assert ran.returncode == 0, ran.stderr
    assert "14 lines, 14 of them there already" in ran.stdout
    assert "left out: AI4I" in ran.stdout
    assert "Left out, as the files were not there: AI4I." in (finished / "q.md").read_text()
    assert (finished / "r.csv").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--parts", "g"], "no part 'g'"), (["--methods", "near"], "'near'"), (["--only", "moon"], "no set 'moon'")],
)
def test_what_is_not_there_is_named(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    ran = run(folder, *arguments, folder=tmp_path)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_columns_of_made_up_rows_are_alike_in_every_class_and_their_densities_true() -> None:
    said = of_benchmarks("""
import numpy as np
from scipy.special import logsumexp
from scipy.stats import ks_2samp
from made_up_contexts import CLASSES, FAMILIES
for family in FAMILIES.values():
    rng = np.random.default_rng(3)
    drawn = family(rng)
    classes = np.repeat(np.arange(CLASSES), 400)
    rows = drawn.rows(classes, rng)
    least = min(ks_2samp(rows[classes == 0, d], rows[classes == k, d]).pvalue
                for k in range(1, CLASSES) for d in range(rows.shape[1]))
    # Of right densities, p(c given x) is calibrated: the mean probability of the guess is how often it is right.
    log_densities = drawn.log_density(rows)
    posterior = np.exp(log_densities - logsumexp(log_densities, axis=1, keepdims=True))
    print(least > 1e-4, abs(posterior.max(axis=1).mean() - (posterior.argmax(axis=1) == classes).mean()) < .02,
          (posterior.argmax(axis=1) == classes).mean() > .6)
""")
    assert said == ["True True True"] * 2


def test_engines_of_training_are_not_judged(folder: Path) -> None:
    said = of_benchmarks(f"""
from pathlib import Path
import pandas as pd
from contexts import engines
folder = Path({str(folder)!r})
cycles = pd.read_parquet(folder / "tabular" / "cmapss_FD002_train.parquet")
split, other = engines(folder, 0), engines(folder, 1)
train, test = cycles.loc[split.train.index], cycles.loc[split.test.index]
print(set(train["unit"]) & set(test["unit"]), train["unit"].nunique(), test["unit"].nunique(), train["rul"].min())
print(sorted(test["rul"][split.is_anomaly].unique().tolist()), test["rul"][~split.is_anomaly].min())
print({{"unit", "rul"}} & set(split.train), set(cycles.loc[other.train.index, "unit"]) == set(train["unit"]))
""")
    assert said == ["set() 20 20 130", "[55, 60, 65, 70, 75] 130", "set() False"]


def test_few_rows_are_so_many_of_each_class_and_fewer_are_among_more() -> None:
    said = of_benchmarks("""
from pathlib import Path
from contexts import Limits, sets
from contextual_methods import class_names
few = {data.name: data.draw(Path(), 5) for data in sets(Limits()) if data.name.startswith("correlations, wrong class")}
splits = [split for name, split in few.items() if name.endswith("rows a class")]
print([split.train["claimed"].value_counts().unique().tolist() for split in splits])
print(all(set(a.train.index) < set(b.train.index) for a, b in zip(splits, splits[1:])))
print(all(split.test.equals(splits[0].test) for split in splits))
""")
    assert said == ["[[10], [30], [100], [300]]", "True", "True"]


def test_wrong_claims_are_wrong_and_half() -> None:
    said = of_benchmarks("""
import numpy as np
from contexts import wrong_claims
classes = np.tile(np.arange(4), 100)
claimed, is_wrong = wrong_claims(classes, 4, np.random.default_rng(0))
print(is_wrong.sum(), ((claimed != classes) == is_wrong).all())
print(np.bincount((claimed - classes)[is_wrong] % 4)[1:].min() > 40)
""")
    assert said == ["200 True", "True"]


def test_detectors_of_claims_tell_a_wrong_claim_and_rank_an_unknown_one_first() -> None:
    said = of_benchmarks("""
import numpy as np
from contrast_peers import CONTRASTS
rng = np.random.default_rng(0)
own = np.repeat(["a", "b", "d"], 60)
train = rng.normal(size=(180, 3)) + np.repeat([0, 6, 12], 60)[:, None]
test = rng.normal(size=(40, 3)) + np.repeat([0, 6], 20)[:, None]
claimed = np.array((["a"] * 10 + ["b"] * 10 + ["b"] * 10 + ["a"] * 9 + ["c"]))
wrong = np.array([False] * 10 + [True] * 10 + [False] * 10 + [True] * 10)
for judge in CONTRASTS.values():
    scores = judge(train, own, test, claimed, 0)
    far = judge(train, own, 1e3 * test, claimed, 0)
    print(scores[wrong].min() > scores[~wrong].max(), scores.argmax() == 39, np.isfinite(far).all())
""")
    assert said == ["True True True"] * 5


def test_ours_tells_wrong_claims_by_the_contrast_and_nothing_without_the_class() -> None:
    said = of_benchmarks("""
import numpy as np, pandas as pd
from contexts import Split
from contextual_methods import ours
from anomaly_cvae.metrics import roc_auc
rng = np.random.default_rng(0)
def rows(classes):
    x = rng.normal(size=len(classes))
    return np.column_stack([x, np.where(classes == "up", x, -x) + .1 * rng.normal(size=len(x))])
train, true = np.repeat(["down", "up"], 150), np.repeat(["down", "up"], 100)
wrong = np.arange(200) % 2 == 1
claimed = np.where(wrong, np.where(true == "up", "down", "up"), true)
frames = [pd.DataFrame(rows(c), columns=["x", "y"]).assign(claimed=s) for c, s in ((train, train), (true, claimed))]
split = Split(*frames, ["claimed"], wrong, wrong_claims=True)
quick = {"n_estimators": 1, "hidden_dims": (32,), "max_steps": 500, "batch_size": 64, "contamination": .01}
for way in ("no condition", "shared", "per class"):
    scores = ours(split, way, quick, 0)
    print(way, *(round(roc_auc(wrong, s), 3) for s in scores.values()), sep=",")
""")
    areas = {way: [float(area) for area in found] for way, *found in (line.split(",") for line in said)}
    assert 0.4 < areas["no condition"][0] < 0.6
    for way in ("shared", "per class"):
        surprise, contrast = areas[way]
        assert surprise > 0.7
        assert contrast > 0.85
        assert contrast > surprise


def test_goals_are_judged_by_the_line_named_beforehand() -> None:
    said = of_benchmarks("""
import pandas as pd
from contextual_goals import lines
rows = [("c", "AI4I", "CVAE balanced", "shared", "negative ELBO", .91, .5),
        ("c", "AI4I", "CVAE balanced", "per class", "negative ELBO", .99, .9),
        ("c", "AI4I", "kNN(5)", "no condition", "score", .8, .4),
        *[("f", f"correlations, wrong class, {n} rows a class", "CVAE balanced", "shared", "contrast", v, .5)
          for n, v in ((30, .90), (300, .93))]]
table = pd.DataFrame(rows, columns=["part", "data", "method", "way", "score", "roc_auc", "average_precision"])
print(*[line for line in lines(table) if line.startswith(("| AI4I", "| corr"))], sep="\\n")
""")
    ours, peer = "0.9900 (CVAE balanced, per class, negative ELBO)", "0.8000 (kNN(5), no condition)"
    assert said[0] == f"| AI4I | AUROC | >= 0.9 | 0.9100 | reached | {ours} | {peer} | {peer} |"
    assert "| average precision | >= 0.53 | 0.5000 | **missed** |" in said[1]
    assert "| <= 0.02 | 0.0300 | **missed** |" in said[2]
