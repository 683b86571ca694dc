"""The goals of the conditional benchmark beside what was measured.

Which line of ours stands for a goal is said here, before the figures: the shared network, by the contrast where claims
are asked about and by the negative ELBO elsewhere. The best of our lines in hindsight stands beside it, as such.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from conditional_peers import PEERS
from contextual_methods import OURS

SHARED = "shared"
ELBO, CONTRAST, HEAD = "negative ELBO", "contrast", "inference head"
MOST_LOST = 0.02
METHOD = "CVAE balanced"
"""It stands for a goal."""


@dataclass(frozen=True)
class Goal:
    """A least mean of a figure on a set."""

    part: str
    data: str
    figure: str
    least: float
    score: str


GOALS = (
    Goal("a", "MNIST", "roc_auc", 0.9993, CONTRAST),
    Goal("a", "MNIST", "roc_auc", 0.9993, HEAD),
    Goal("a", "Fashion-MNIST", "roc_auc", 0.992, CONTRAST),
    Goal("a", "Fashion-MNIST", "roc_auc", 0.992, HEAD),
    Goal("b", "NSL-KDD, protocol", "roc_auc", 0.972, ELBO),
    Goal("b", "NSL-KDD, protocol and service", "roc_auc", 0.972, ELBO),
    Goal("c", "AI4I", "roc_auc", 0.900, ELBO),
    Goal("c", "AI4I", "average_precision", 0.53, ELBO),
    Goal("d", "C-MAPSS FD002", "roc_auc", 0.82, ELBO),
)
NAMES = {"roc_auc": "AUROC", "average_precision": "average precision"}


def lines(table: pd.DataFrame) -> list[str]:
    """The tables of goals; nothing of a part that was not measured."""
    rows = [line for goal in GOALS if (line := of_goal(table, goal))]
    rows += [line for data in made_up(table) if (line := beside_peers(table, data))]
    rows += [line for name in thinned(table) if (line := lost(table, name))]
    if not rows:
        return []
    head = [
        "The line of ours that stands for a goal is the shared network with the defaults (balanced), by the "
        "contrast where claims are asked about (of images by q(c given x), too, the inference head that is trained "
        "with the network: lines added when its first figures had been seen), by the negative ELBO elsewhere; *best of "
        "ours* is chosen in hindsight.",
        "",
        "| set | figure | goal | measured | | best of ours | best peer, no contrast | best peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*head, *rows, ""]


def value(table: pd.DataFrame, part: str, data: str, score: str, figure: str = "roc_auc") -> float | None:
    """Mean over seeds of the line of ours that stands for a set; None if it was not measured."""
    own = table[(table["part"] == part) & (table["data"] == data) & (table["way"] == SHARED)]
    own = own[own["score"] == score]
    found = own.loc[own["method"] == METHOD, figure]
    return float(found.mean()) if len(found) else None


def best(table: pd.DataFrame, part: str, data: str, figure: str, whose: str) -> str:
    """The highest mean of a set among our lines, the peers' three ways, or all peers, and which it is."""
    own = table[(table["part"] == part) & (table["data"] == data) & (table["method"] != "true densities")]
    is_ours = own["method"].isin(list(OURS))
    mask = {"ours": is_ours, "three ways": own["method"].isin(list(PEERS)), "peers": ~is_ours}[whose]
    means = own[mask].groupby(["method", "way", "score"])[figure].mean()
    if means.empty:
        return ""
    method, way, score = means.idxmax()
    said = f"{method}, {way}, {score}" if whose == "ours" else f"{method}, {way}"
    return f"{means.max():.4f} ({said})"


def _line(
    table: pd.DataFrame, part: str, data: str, figure: str, goal: str, measured: float, is_reached: bool,
    what: str | None = None,
) -> str:  # fmt: skip
    others = " | ".join(best(table, part, data, figure, whose) for whose in ("ours", "three ways", "peers"))
    verdict = "reached" if is_reached else "**missed**"
    return f"| {data} | {what or NAMES[figure]} | {goal} | {measured:.4f} | {verdict} | {others} |"


def of_goal(table: pd.DataFrame, goal: Goal) -> str:
    """A line of the table of goals, empty if nothing was measured."""
    found = value(table, goal.part, goal.data, goal.score, goal.figure)
    if found is None:
        return ""
    least = f">= {goal.least:g}"
    what = f"{NAMES[goal.figure]}{', inference head' if goal.score == HEAD else ''}"
    return _line(table, goal.part, goal.data, goal.figure, least, found, found >= goal.least, what)


def made_up(table: pd.DataFrame) -> list[str]:
    """The sets of part (e) that were measured."""
    return list(table[table["part"] == "e"]["data"].unique())


def beside_peers(table: pd.DataFrame, data: str) -> str:
    """Part (e): above every peer in all three ways?"""
    found = value(table, "e", data, CONTRAST if data.endswith("wrong class") else ELBO)
    own = table[(table["part"] == "e") & (table["data"] == data) & table["method"].isin(list(PEERS))]
    if found is None or own.empty:
        return ""
    highest = float(own.groupby(["method", "way"])["roc_auc"].mean().max())
    return _line(table, "e", data, "roc_auc", "above every peer's three ways", found, found > highest)


def thinned(table: pd.DataFrame) -> list[str]:
    """The sets of part (f), without their number of rows."""
    return list(dict.fromkeys(table[table["part"] == "f"]["data"].str.rsplit(", ", n=1).str[0]))


def lost(table: pd.DataFrame, name: str) -> str:
    """Part (f): what the shared network loses from 300 to 30 rows a class."""
    score = CONTRAST if name.endswith("wrong class") else ELBO
    many, few = (value(table, "f", f"{name}, {rows} rows a class", score) for rows in (300, 30))
    if many is None or few is None:
        return ""
    verdict = "reached" if many - few <= MOST_LOST else "**missed**"
    goal = f"<= {MOST_LOST:g}"
    return (
        f"| {name}, few rows | AUROC lost from 300 to 30 rows a class | {goal} | {many - few:.4f} | {verdict} | | | |"
    )
