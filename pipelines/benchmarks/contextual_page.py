"""The section of the conditional benchmark in the page of quality, and its lines as CSV beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import contextual_goals
import numpy as np
import page
import pandas as pd
import ranking
from contexts import FEW_ROWS, Limits
from contextual_methods import TRUTH

SECTION = "Tables and images with a condition"
KEYS = ["data", "method", "way", "score"]
FIGURES = ("roc_auc", "average_precision")
ABOUT = {
    "a": "Images, half of those judged under another class's name",
    "b": "NSL-KDD: attacks",
    "c": "AI4I: failures",
    "d": "C-MAPSS FD002: early wear in six operating regimes",
    "e": "Made-up rows: every column by itself is alike in every class",
}


@dataclass(frozen=True)
class ToDo:
    """What the page does not have: sets without a file; of all lines planned, those measured; sets and methods left."""

    absent: Sequence[str]
    lines: int
    measured: int
    sets: Sequence[str]
    methods: Sequence[str]

    def said(self) -> list[str]:
        """As paragraphs."""
        lines = []
        if self.absent:
            lines += ["", f"Left out, as the files were not there: {'; '.join(self.absent)}."]
        if self.measured < self.lines:
            lines += ["", f"**Not complete**: {self.measured} of {self.lines} planned lines are measured."]
        if self.sets:
            lines += ["", f"Not measured yet: {'; '.join(self.sets)}."]
        if self.methods:
            lines += ["", f"On no set yet: {'; '.join(self.methods)}."]
        return lines


def write(path: Path, table: pd.DataFrame, limits: Limits, to_do: ToDo) -> None:
    """Replace the section of the page, and write every line beside it as CSV."""
    lines = [page.measured_on("make bench-contextual"), "", *introduction(table, limits), *to_do.said(), ""]
    lines += contextual_goals.lines(table)
    means = mean_lines(table)
    for part, title in ABOUT.items():
        own = means[means["part"] == part]
        if own.empty:
            continue
        lines += [f"### ({part}) {title}", ""]
        for data in own["data"].unique():
            lines += comparison(own[own["data"] == data], data)
    lines += few_rows(means[means["part"] == "f"])
    page.write_section(path, SECTION, lines, title=ranking.TITLE, order=ranking.ORDER)
    sorted_lines = table.sort_values(["part", *KEYS, "seed"])
    sorted_lines.to_csv(path.with_name("contextual.csv"), index=False, float_format="%.5f")


def introduction(table: pd.DataFrame, limits: Limits) -> list[str]:
    """What was run, what was not, and what each word of the tables means."""
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    lines = [
        f"Seeds {seeds}: means (standard deviation); *seeds* says how many of them a line has. Training rows are "
        "normal, labels serve for the figures and nothing else. *No condition*: it is in no column either. Peers "
        "have the settings of `conditional_peers.py`, not tuned, on standardised columns (pixels: from 0 to 1, "
        "covariances of their first 50 principal components) and one-hot words; *one per class* brings each class's "
        "scores to the median and 0.9 quantile of its training scores, classes of fewer than 50 training rows being "
        "judged by the detector of all rows (not where rows are few by intent). Ours: a preset as it is (told a "
        "condition, with one network), thresholds by a share of the training rows, so that none is held "
        "out for them; *shared* and *per class* are its two ways of conditioning, the latter not of NSL-KDD's "
        "services, some of which have fewer than the ten rows that a network takes. A row of an unknown class ranks "
        "first wherever the method knows classes. Detectors of claims (*given the class*) ask how much better another "
        "class explains the row: kNN by distances, the others by -log p(claimed class given x); *true densities* are "
        "the ceiling, and no detector. Seconds are of one "
        "core's time.",
        "",
        "AI4I: half of the normal rows train. NSL-KDD: the given files, `flag` in x and `difficulty` left out; only "
        "what draws random numbers varies. C-MAPSS: half of the engines of the training file train, by cycles with "
        "more than 125 to go; of the other half, such cycles against those with more than 50 and at most 75 to go. The "
        "seed draws splits, made-up distributions and images. Two things were decided here. By these figures (seed "
        "10): that networks are alike where they are told a condition, as a second one with a KL weight of .1 ranked "
        "rows of NSL-KDD, AI4I and the made-up sets worse, of C-MAPSS better. By seeds 20 and 21 of the same sets "
        "(NSL-KDD's rows are the same with every seed): where networks begin, of three ways, and that parts count "
        "alike (*parts by their spread*: as without a condition). Nothing else was tuned here; how small the "
        "condition's weights start had been chosen with splits 0 to 5 of AI4I (and the digits) in view, the width of a "
        "pixel by the study of MNIST (`pipelines/drawn_digits.py`)."
        " How hard the made-up rows are was set by their true densities and peers before any of ours was run on them.",
    ]
    if (table["part"] == "a").any():
        lines += [
            "",
            f"Images: {limits.training_images:,} for training, {limits.test_images:,} to judge, "
            f"{limits.image_steps:,} training steps of a small convolutional network (one per class: 16 images in a "
            "step of each): few, for want of time; what more steps give is in [images](images.md). That they are more "
            "than 1,200 was decided when figures of 1,200 had been seen, by another seed.",
        ]
    return lines


def mean_lines(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, and their number, of every line: columns part, the keys, figures."""
    grouped = table.groupby(["part", *KEYS], sort=False)
    parts = {
        f"{figure}_{what}": grouped[figure].agg(what) for figure in (*FIGURES, "seconds") for what in ("mean", "std")
    }
    return pd.DataFrame({**parts, "seeds": grouped["seed"].nunique()}).reset_index()


def comparison(means: pd.DataFrame, data: str) -> list[str]:
    """One set: a line per method, way and score; the best of each figure in bold, the truth aside."""
    lines = [
        f"**{data}**", "", "| method | way | score | AUROC | average precision | seconds | seeds |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    found = means[means["method"] != TRUTH]
    best = {figure: found[f"{figure}_mean"].max() for figure in FIGURES}
    for _, row in means.iterrows():
        cells = [cell(row[f"{figure}_mean"], row[f"{figure}_std"], best[figure]) for figure in FIGURES]
        if row["method"] == TRUTH:
            cells = [text.replace("**", "") for text in cells]
        said = f"| {row['method']} | {row['way']} | {row['score']} |"
        lines.append(f"{said} {' | '.join(cells)} | {row['seconds_mean']:.0f} | {row['seeds']} |")
    return [*lines, ""]


def few_rows(means: pd.DataFrame) -> list[str]:
    """Part (f): a table per set, a column per number of rows, and what is lost from 300 to 30."""
    if means.empty:
        return []
    means = means.assign(
        set=means["data"].str.rsplit(", ", n=1).str[0],
        rows=means["data"].str.rsplit(", ", n=1).str[1].str.split().str[0].astype(int),
    )
    lines = ["### (f) Few training rows per class: AUROC", ""]
    for name, own in means.groupby("set", sort=False):
        wide = own.pivot_table(index=["method", "way", "score"], columns="rows", values="roc_auc_mean", sort=False)
        wide = wide.reindex(columns=list(FEW_ROWS))
        lines += [f"**{name}**", "", f"| method | way | score | {' | '.join(map(str, FEW_ROWS))} | 300 less 30 |"]
        lines += ["|---|---|---|" + "---|" * (len(FEW_ROWS) + 1)]
        for key, row in wide.iterrows():
            cells = ["" if pd.isna(row[n]) else f"{row[n]:.3f}" for n in FEW_ROWS]
            lost = row[300] - row[30]
            lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} | {'' if pd.isna(lost) else f'{lost:+.3f}'} |")
        seeds = sorted(own["seeds"].unique())
        lines += ["", f"Seeds per line: {', '.join(map(str, seeds))}.", ""]
    return lines


def cell(mean: float, std: float, best: float) -> str:
    """Mean and, where there is one, standard deviation; the best in bold."""
    spread = "" if not np.isfinite(std) or std < 5e-5 else f" ({std:.3f})"
    return f"**{mean:.4f}**{spread}" if abs(mean - best) < 5e-5 else f"{mean:.4f}{spread}"
