"""The main job on real data: which handwritten digits are not what they claim to be, and why.

Trains a CVAE per digit, one CVAE that is told the digit, and one that is told nothing, on the digits that come
with scikit-learn; calibrates, scores, explains, samples, and logs a run of each. Run it with `make demo`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawn_digits
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from studies import Study

from anomaly_cvae import CVAEDetector, metrics, plots, presets, tracking
from anomaly_cvae.datasets import DIGIT_MAX, DIGIT_SIDE, ClaimedDigits, claimed_digits, labelled_images

EXPERIMENT = "digits"
SAMPLES_PER_CLASS = 10
SURPRISING = 12
ONE_NETWORK = {**presets.BALANCED, "n_estimators": 1}
"""Of KL weight 1: half the wait, and a wrong label is no question of neighbours."""
SCORES = {"elbo": "ELBO", "contrast": "contrast", "both": "both"}
TITLES = {
    "per class": "one CVAE per digit, trained together",
    "shared": "one CVAE that is told the digit",
    "not told": "the same CVAE, not told the digit",
}
RUN_NAMES = {"per class": "one CVAE per class", "shared": "shared CVAE", "not told": "no condition"}
TABLE_STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "title_justify": "left",
    "title_style": "bold",
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}


@dataclass(frozen=True)
class Candidate:
    """One fitted detector with its scored test rows."""

    name: str
    detector: CVAEDetector
    table: pd.DataFrame
    seconds: float

    @property
    def kind(self) -> str:
        """What it scores by, in words."""
        return SCORES[self.detector.score_kind]

    @property
    def scores(self) -> np.ndarray:
        """Higher = more anomalous."""
        return self.table["score"].to_numpy()


def main() -> None:
    """Run the job from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="digits", help="digits (with scikit-learn), or mnist, …: any name, with --source"
    )
    parser.add_argument("--source", type=Path, help="npz or folder of idx files in the layout of MNIST")
    parser.add_argument("--preset", choices=("fast", "best"), default="fast", help="with --source")
    parser.add_argument("--rows", type=int, help="with --source: train on so many images only")
    parser.add_argument("--steps", type=int, help="with --source: train for so many steps")
    parser.add_argument("--write", type=int, metavar="NUMBER", help="with --source: a number to write by hand")
    parser.add_argument("--output", type=Path, help="folder for Parquet and pictures; default: outputs/digits")
    parser.add_argument("--random-state", type=int, default=0)
    parser.add_argument("--no-tracking", action="store_true", help="write files only, no MLflow run")
    parser.add_argument(
        "--tables", type=Path, help="write the digits as train.parquet and test.parquet there, and stop"
    )
    arguments = parser.parse_args()
    if arguments.data != "digits" and arguments.source is None:
        parser.error(f"--data {arguments.data} needs --source: an npz or a folder of idx files")
    output = arguments.output or Path("outputs/digits")
    if arguments.tables is not None:
        write_tables(arguments.tables, arguments.random_state)
    elif arguments.source is not None:
        run_study(arguments)
    else:
        run(output, arguments.random_state, track=not arguments.no_tracking, console=Console())


def run_study(arguments: argparse.Namespace) -> None:
    """The images of ``--source``: see `drawn_digits`."""
    name, track = f"digits-{arguments.data}", not arguments.no_tracking
    output = arguments.output or Path("outputs") / name / arguments.preset
    study = Study(name, arguments.preset, output, arguments.random_state, track, arguments.rows, arguments.steps)
    drawn_digits.run(study, labelled_images(arguments.source), arguments.write)


def write_tables(folder: Path, random_state: int) -> None:
    """The demo's digits as tables, for `pipelines/configs/digits.yaml` and the command line."""
    data = claimed_digits(random_state=random_state)
    folder.mkdir(parents=True, exist_ok=True)
    data.train.to_parquet(folder / "train.parquet", index=False)
    data.test.assign(is_anomaly=data.is_anomaly).to_parquet(folder / "test.parquet", index=False)
    print(f"{folder / 'train.parquet'}: {len(data.train):,} rows, {folder / 'test.parquet'}: {len(data.test):,} rows")


def run(output: Path, random_state: int, *, track: bool, console: Console) -> list[Candidate]:
    """Do the whole job and return the candidates."""
    started = time.perf_counter()
    data = claimed_digits(random_state=random_state)
    counts = {what: int((data.what == what).sum()) for what in ("normal", "wrong label", "damaged")}
    console.rule("[bold]Digits that are not what they claim to be")
    console.print(
        f"{len(data.train):,} digits to learn from. {len(data.test)} unseen ones to judge: {counts['normal']} as they "
        f"should be,\n{counts['wrong label']} under a wrong label, {counts['damaged']} damaged.\n"
    )
    candidates = [
        candidate
        for name, conditioning in (
            ("per class", "per_class"),
            ("shared", "shared"),
            ("not told", None),
        )
        for candidate in train(name, conditioning, data, random_state, console)
    ]
    # Chosen beforehand, not by a test label: the default conditioning, and the score that sees both kinds of fault.
    best = next(c for c in candidates if c.name == "shared" and c.detector.score_kind == "both")
    console.print(results_table(candidates, data))
    console.print(per_class_table(candidates, data))
    console.print(thresholds_note(best, data))
    figures = draw(best, candidates, data, random_state)
    written = write(output, best, figures, data)
    runs = log(candidates, best, figures, data) if track else None
    say_what_next(console, best, written, runs, time.perf_counter() - started)
    return candidates


def train(
    name: str, conditioning: str | None, data: ClaimedDigits, random_state: int, console: Console
) -> list[Candidate]:
    """Fit one detector; a conditional one gives a candidate for each kind of score, without further training."""
    console.print(f"[bold]{name}[/bold]: {TITLES[name]}")
    detector = CVAEDetector(
        condition_columns=["claimed"] if conditioning else None,
        ignore_columns=None if conditioning else ["claimed"],
        conditioning=conditioning or "shared",
        random_state=random_state,
        verbose=1,
        **ONE_NETWORK,
    )
    started = time.perf_counter()
    detector.fit(data.train)
    seconds = time.perf_counter() - started
    candidates = []
    for kind in SCORES if conditioning else ("elbo",):
        scored = detector if kind == "elbo" else copy_with(detector, kind)
        table = scored.score_table(data.test, contrast=conditioning is not None, top_column=kind == "both")
        candidates.append(Candidate(name, scored, table, seconds))
    return candidates


def copy_with(detector: CVAEDetector, score_kind: str) -> CVAEDetector:
    """The same fitted model, scoring by something else."""
    other = CVAEDetector(**{**detector.get_params(), "score_kind": score_kind})
    other.__dict__.update({name: value for name, value in vars(detector).items() if name not in other.get_params()})
    return other


def results_table(candidates: list[Candidate], data: ClaimedDigits) -> Table:
    """One line per candidate."""
    table = Table(
        title="Ranking (AP: average precision), and verdicts at 1 % false alarms",
        **TABLE_STYLE,
    )
    for header in ("model", "score"):
        table.add_column(header)
    for header in ("AUROC\nall", "AP\nall", "AUROC\nlabels", "AUROC\ndamage", "found", "false\nalarms", "fit"):
        table.add_column(header, justify="right")
    normal = data.what == "normal"
    for candidate, name in zip(candidates, _once(candidates), strict=True):
        flagged = candidate.table["is_anomaly"].to_numpy()
        table.add_row(
            name,
            candidate.kind,
            f"{metrics.roc_auc(data.is_anomaly, candidate.scores):.4f}",
            f"{metrics.average_precision(data.is_anomaly, candidate.scores):.4f}",
            *(f"{_roc_auc_of(what, candidate, data):.4f}" for what in ("wrong label", "damaged")),
            f"{flagged[~normal].mean():.0%}",
            f"{flagged[normal].mean():.1%}",
            f"{candidate.seconds:.0f} s" if name else "",
        )
    return table


def _roc_auc_of(what: str, candidate: Candidate, data: ClaimedDigits) -> float:
    """AUROC of one kind of anomaly against the normals."""
    rows = (data.what == "normal") | (data.what == what)
    return metrics.roc_auc(data.what[rows] == what, candidate.scores[rows])


def per_class_table(candidates: list[Candidate], data: ClaimedDigits) -> Table:
    """AUROC and average precision per claimed digit."""
    claimed = data.test["claimed"].to_numpy()
    table = Table(title="Per claimed digit: AUROC, and below it AP", **TABLE_STYLE)
    table.add_column("model")
    table.add_column("score")
    for digit in range(10):
        table.add_column(str(digit), justify="right")
    for candidate, name in zip(candidates, _once(candidates), strict=True):
        ranking = metrics.ranking_table(data.is_anomaly, candidate.scores, claimed)
        cells = [ranking.loc[str(digit)] for digit in range(10)]
        texts = [f"{_short(cell['roc_auc'])}\n[dim]{_short(cell['average_precision'])}[/dim]" for cell in cells]
        table.add_row(name, candidate.kind, *texts)
    return table


def _once(candidates: list[Candidate]) -> list[str]:
    """Names of the candidates, blank where the line above has the same."""
    names = [c.name for c in candidates]
    return ["" if i and names[i - 1] == name else name for i, name in enumerate(names)]


def _short(share: float) -> str:
    """Three digits: .987, or 1.00."""
    text = f"{share:.3f}"
    return "1.00" if text == "1.000" else text.removeprefix("0")


def thresholds_note(best: Candidate, data: ClaimedDigits) -> str:
    """The realised false-alarm rate beside the asked one."""
    normal = data.what == "normal"
    false_alarms = float(best.table["is_anomaly"].to_numpy()[normal].mean())
    thresholds = best.detector.thresholds_
    rows = int(thresholds["calibration_rows"].iloc[:10].sum())
    low, high = metrics.false_alarm_interval(rows, int(normal.sum()), best.detector.false_alarm_rate)
    guarantees = ", ".join(sorted(set(thresholds["guarantee"].iloc[:10])))
    return (
        f"False alarms of the {best.name} model ({best.kind}): asked {best.detector.false_alarm_rate:.1%}, realised "
        f"{false_alarms:.1%}\nof {normal.sum()} normals. A right threshold from {rows} calibration rows gives\n"
        f"{low:.1%} to {high:.1%} (95 %). Guarantee: {guarantees}. {rows // 10} rows per digit cannot\n"
        "resolve 1 %, so each digit borrows the others' rows, and many anomalies\nrank high but stay unflagged.\n"
    )


def draw(best: Candidate, candidates: list[Candidate], data: ClaimedDigits, random_state: int) -> dict[str, Figure]:
    """The pictures of the run."""
    detector = best.detector
    curves = {
        f"{c.name}, {c.kind}": metrics.curves(data.is_anomaly, c.scores)
        for c in candidates
        if c.detector.score_kind != "contrast"
    }
    areas = {
        f"{c.name}, {c.kind}": (
            metrics.roc_auc(data.is_anomaly, c.scores),
            metrics.average_precision(data.is_anomaly, c.scores),
        )
        for c in candidates
    }
    digits = np.repeat(np.arange(10), SAMPLES_PER_CLASS)
    sampled = detector.sample(len(digits), condition=digits, random_state=random_state)
    samples = sampled.drop(columns="claimed").to_numpy().reshape(10, SAMPLES_PER_CLASS, DIGIT_SIDE, DIGIT_SIDE)
    return {
        "surprising": surprising(best, data),
        "samples": plots.image_grid(np.clip(samples, 0, DIGIT_MAX), [str(digit) for digit in range(10)]),
        "models_compared": plots.roc_and_pr(curves, areas),
    }


def surprising(best: Candidate, data: ClaimedDigits) -> Figure:
    """The highest scores: of the wrong labels in the upper half, of the damaged in the lower half."""
    rows: list[int] = []
    for what in ("wrong label", "damaged"):
        places = np.flatnonzero(data.what == what)
        rows += places[np.argsort(-best.scores[places])][: SURPRISING // 2].tolist()
    chosen = data.test.iloc[rows]
    nats = best.detector.explain(chosen).drop(columns="kl").to_numpy()
    guess = best.detector.condition_proba(chosen).idxmax(axis=1)
    expected = best.detector.reconstruct(chosen).drop(columns="claimed").to_numpy()
    titles = [
        f"claims {claimed}, looks like {looks}\n{total:.0f} nats, contrast {contrast:.0f}"
        for claimed, looks, total, contrast in zip(
            chosen["claimed"],
            guess,
            best.table["negative_elbo"].iloc[rows],
            best.table["contrast"].iloc[rows],
            strict=True,
        )
    ]
    shape = (len(rows), DIGIT_SIDE, DIGIT_SIDE)
    images = chosen.drop(columns="claimed").to_numpy().reshape(shape)
    excess = np.maximum(nats - nats.mean(axis=1, keepdims=True), 0.0)
    return plots.surprising_images(images, excess.reshape(shape), expected.reshape(shape), titles)


def write(output: Path, best: Candidate, figures: dict[str, Figure], data: ClaimedDigits) -> dict[str, Path]:
    """Scored Parquet, pictures and the model, in ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    paths = {"scored": output / "scored.parquet"}
    kept = pd.DataFrame({"true_digit": data.true_digit, "what": data.what}, index=data.test.index)
    kept.join(best.table).to_parquet(paths["scored"], index=False)
    for name, figure in figures.items():
        paths[name] = output / f"{name}.png"
        figure.savefig(paths[name], dpi=110)
    paths["model"] = best.detector.save(output / "model")
    return paths


def log(candidates: list[Candidate], best: Candidate, figures: dict[str, Figure], data: ClaimedDigits) -> str:
    """One MLflow run per model, comparable; the best one carries the pictures. Returns the tracking URI."""
    uri = tracking.use_store(EXPERIMENT)
    for name in dict.fromkeys(c.name for c in candidates):
        candidate = [c for c in candidates if c.name == name][-1]
        evaluation = metrics.Evaluation(
            is_anomaly=data.is_anomaly,
            scores=candidate.scores,
            flagged=candidate.table["is_anomaly"].to_numpy(),
            classes=data.test["claimed"].astype(str).to_numpy(),
        )
        extras = tracking.Extras(
            seconds={"fit": candidate.seconds},
            datasets=[
                tracking.DataSet(data.train, "scikit-learn digits", "training"),
                tracking.DataSet(data.test, "scikit-learn digits", "evaluation"),
            ],
            alarm_columns=candidate.detector.alarm_columns(data.test),
            figures=figures if candidate is best else {},
        )
        tags = {"data": "digits", "score": candidate.kind, "job": "train"}
        with tracking.start_run(f"digits, {RUN_NAMES[name]}", tags):
            tracking.log_detector(candidate.detector, evaluation, extras)
    return uri


def say_what_next(
    console: Console, best: Candidate, written: dict[str, Path], runs: str | None, seconds: float
) -> None:
    """End by saying what to open."""
    console.rule("[bold]What to open next")
    described = {
        "surprising": "the most surprising rows, and the pixels that made them so",
        "samples": "digits drawn by the model, one row per digit",
        "models_compared": "ROC and precision-recall of every model",
        "scored": "every test row: score, threshold, p-value, top pixel",
        "model": f"the {best.name} model; CVAEDetector.load reads it",
    }
    for name, description in described.items():
        console.print(f"  [bold]{written[name]}[/bold]\n      {description}")
    if runs:
        console.print("  [bold]make ui[/bold]\n      the runs in MLflow, at http://127.0.0.1:5000")
        console.print("      (choose 'Model training', top left: MLflow opens on agents and traces)")
    console.print(f"\nDone in {seconds:.0f} s.")


if __name__ == "__main__":
    main()
