"""What each part of the balanced configuration is worth: one thing changed at a time, on the splits of `adbench`.

    python pipelines/benchmarks/ablation.py FOLDER        # or: make bench-ablation DATA=FOLDER

Figures stand apart for the sets whose labels were looked at in choosing parameters and for those that were not.
Finished lines are kept in outputs/adbench/ablation.csv, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import adbench
import one_class_methods
import page
import pandas as pd
import ranking
import resumable

RESULTS = Path("outputs/adbench/ablation.csv")
SECTION = "Ablation"
BASE = "CVAE balanced"
UNSEEN = ("cover", "donors", "http", "magic.gamma", "skin", "campaign", "celeba")
"""Sets whose labels chose nothing."""
PARTS = ("tuning", "other")


LEFT = """### Tried and left

Of the table above, what gave nothing or took something away is no default: other KL weights and noise, more or wider
networks, other priors, more hidden cells. Networks that differ in their noise (a tuple as `input_noise`) are an option,
as they cost nothing.

Not in the table, for they are no parameters; compared by hand on the tuning sets, and deleted:

- *Columns on normal scores* (smoothed quantiles), in the place of the robust scale, as its density with the slopes
  counted, or as a second bank beside the first: little on two sets, nothing on the others, at twice the time.
- *The score of a cell given the others* (cells hidden in turn, or at random): no better than the negative ELBO, at many
  times its cost. Mending a cell says what is to blame instead.
- *A start at a factor analysis* where there is no condition: worse here; with a condition it is the default.
- *Principal components* in the place of the factor analysis: worse on engines, where the KL tells wear.
- *Both starts, and the one with the better held-out negative ELBO*: it is mostly the better detector, too, and would
  lift the start's limits, at twice the time. Not built.
- *Two unlike networks where a condition is told*, with parts as they are or by their spread: worse on most of the
  conditional sets.
- *Contrast by parts on their spread*: worse than by the bound.
"""


def variants() -> list[str]:
    """The balanced one, and what is changed of it."""
    return [BASE, *(f"{BASE}, {change}" for change in one_class_methods.ABLATION)]


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Lines of the variants, with the part that each set belongs to; of a part only variants with all its lines."""
    own = table[table["method"].isin(variants())]
    own = own.assign(part=own["data"].isin(UNSEEN).map({False: PARTS[0], True: PARTS[1]}))
    return own.groupby("part", group_keys=False)[own.columns.tolist()].apply(_as_the_base)


def _as_the_base(part: pd.DataFrame) -> pd.DataFrame:
    lines = {method: set(zip(own["data"], own["seed"], strict=True)) for method, own in part.groupby("method")}
    return part[[lines[method] == lines.get(BASE) for method in part["method"]]]


def section(table: pd.DataFrame) -> list[str]:
    """The lines of the page."""
    own = measured(table)
    n_sets = own.groupby("part")["data"].nunique()
    seeds = ", ".join(map(str, sorted(own["seed"].unique())))
    return [
        page.measured_on("make bench-ablation"),
        "",
        f"The defaults with all rows for training, and one thing changed at a time; splits as above, seed {seeds}. "
        f"The {n_sets.get(PARTS[0], 0)} tuning sets are those whose labels were looked at when parameters were chosen; "
        f"those of the {n_sets.get(PARTS[1], 0)} others ({', '.join(sorted(set(own['data']) & set(UNSEEN)))}) chose "
        "nothing but the KL weight of .1 and that parts are summed by their spread, which were picked when figures of "
        "all sets had been seen. Behind "
        "each mean: the mean difference from the first line and, in brackets, its 95 % interval (sets "
        "drawn again 10,000 times).",
        "",
        "| | tuning sets, AUROC | average precision | other sets, AUROC | average precision |",
        "|---|---|---|---|---|",
        *(_line(own, variant) for variant in variants() if (own["method"] == variant).any()),
        "",
        LEFT,
    ]


def _line(own: pd.DataFrame, variant: str) -> str:
    name = "the balanced one" if variant == BASE else variant.removeprefix(f"{BASE}, ")
    cells = [_cell(own[own["part"] == part], variant, figure) for part in PARTS for figure in ranking.FIGURES]
    return f"| {name} | {' | '.join(cells)} |"


def _cell(own: pd.DataFrame, variant: str, figure: str) -> str:
    mine = own.loc[own["method"] == variant, figure]
    if mine.empty:
        return "not measured"
    if variant == BASE:
        return f"{mine.mean():.3f}"
    return f"{mine.mean():.3f}, {ranking.signed(*ranking.difference(own, variant, BASE, figure))}"


def main() -> None:
    """Run what is missing, then write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--changes", nargs="+", default=list(one_class_methods.ABLATION), metavar="CHANGE",
                        help=f"of {'; '.join(one_class_methods.ABLATION)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", help="these sets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="sets at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=adbench.REPORT)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.changes if name not in one_class_methods.ABLATION]
    if unknown:
        parser.error(f"no change {unknown[0]!r}; there are {', '.join(one_class_methods.ABLATION)}")
    files = {adbench.name_of(file): file for file in sorted(arguments.folder.glob("*.npz"))}
    chosen = arguments.only or list(files)
    absent = [name for name in chosen if name not in files]
    if absent or not files:
        parser.error(f"{arguments.folder} holds no {f'set {absent[0]!r}' if absent else 'npz file'}")
    done = adbench.load(arguments.results)
    methods = [BASE, *(f"{BASE}, {change}" for change in arguments.changes)]
    tasks = [adbench.Task(d, m, s) for s in arguments.seeds for m in methods for d in chosen]
    missing = resumable.missing(tasks, done, ("data", "method", "seed"))
    print(f"{len(tasks)} lines, {len(tasks) - len(missing)} of them there already")
    if missing and not arguments.page_only:
        work = partial(adbench.run, files)
        resumable.run_all(work, missing, arguments.workers, arguments.results, adbench.said)
    table = adbench.load(arguments.results)
    if not (table["method"] == BASE).any():
        raise SystemExit("the balanced one has not been measured: there is nothing to compare with")
    page.write_section(arguments.output, SECTION, section(table), title=ranking.TITLE, order=ranking.ORDER)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
