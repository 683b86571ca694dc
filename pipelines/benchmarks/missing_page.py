"""The section on missing cells: AUROC by share, what is lost, and what the right likelihoods are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import page
import pandas as pd
import ranking

SECTION = "Missing cells"
COMMAND = "make bench-missing"
OURS = "CVAE, calibrated_score"
ONE_HOT = "CVAE, all one-hot and normal"
MIXED = ("AI4I", "NSL-KDD")
LOSS_AT = 0.3
GOAL = 0.5


def write(path: Path, table: pd.DataFrame) -> None:
    """Replace the section of the page, and write means over seeds beside it as CSV."""
    per_set = table.groupby(["data", "method", "share"], as_index=False)[list(ranking.FIGURES)].mean()
    lines = [page.measured_on(COMMAND), "", introduction(table), ""]
    for title, own in ((f"{n} sets" if (n := _real(per_set)["data"].nunique()) else "", _real(per_set)),
                       ("Mixed columns", per_set[per_set["data"].isin(MIXED)])):  # fmt: skip
        if own.empty:
            continue
        # The network on one-hot columns was run on mixed ones alone, and has a table of its own.
        compared = own[own["method"] != ONE_HOT]
        lines += [f"### {title}", "", *page.goal_table([goal(compared)]), *by_share(compared)]
    lines += [*likelihoods(per_set), *by_set(per_set)]
    page.write_section(path, SECTION, lines, title=ranking.TITLE, order=ranking.ORDER)
    per_set.to_csv(path.with_name("missing.csv"), index=False, float_format="%.4f")


def _real(per_set: pd.DataFrame) -> pd.DataFrame:
    return per_set[~per_set["data"].isin(MIXED)]


def introduction(table: pd.DataFrame) -> str:
    """What was run, and how rows with different cells missing are brought on one scale."""
    return (
        f"{table['data'].nunique()} sets, {ranking.seeds_run(table)}, the balanced preset. Half of the normal rows, "
        "at most 10,000, train everyone, complete; of the other half and the anomalies at most 3,000 are the test, in "
        "which each cell is missing with the same probability, the same cells for everyone (one of each row stays). "
        "Ours scores what is there: `calibrated_score`, the negative ELBO less what its cells cost a normal row, on "
        "the scale of normals that miss as many cells; beside it the bare negative ELBO, which is no fair ranking of "
        "rows with different cells, and conformal p-values, which tie where it matters. Peers: means, the five "
        "nearest of 1,000 training rows, or ten rounds of ridge regressions learned from these put in what is "
        "missing; then a detector with its defaults. Words are one-hot for peers. No condition. That the first network "
        "completes a row for the second was decided when these figures without it had been seen, by labels of the "
        "fifteen tuning sets with seed 0."
    )


def averages(per_set: pd.DataFrame, figure: str = "roc_auc") -> pd.DataFrame:
    """Mean over sets, methods by shares; the best with a few cells missing first."""
    wide = per_set.pivot_table(index="method", columns="share", values=figure)
    return wide.sort_values(LOSS_AT, ascending=False)


def best_peer(means: pd.DataFrame) -> str:
    """The peer with the highest figure at `LOSS_AT`."""
    return str(next(name for name in means.index if not name.startswith("CVAE")))


def goal(per_set: pd.DataFrame) -> page.Goal:
    """Our loss by that of the best peer."""
    means = averages(per_set)
    loss = means[0.0] - means[LOSS_AT]
    peer = best_peer(means)
    return page.Goal(
        f"AUROC lost at {LOSS_AT:.0%} missing, by what the best peer there ({peer}) loses",
        np.array([loss[OURS] / loss[peer]]), GOAL, at_most=True,
    )  # fmt: skip


def by_share(per_set: pd.DataFrame) -> list[str]:
    """AUROC and average precision of every method at every share."""
    both = [averages(per_set, figure) for figure in ranking.FIGURES]
    shares = list(both[0].columns)
    lines = [
        "AUROC / average precision, means over sets, by share of cells missing; *lost*: AUROC from none to 30 %.", "",
        f"| method | {' | '.join(f'{share:.0%}' for share in shares)} | lost |", "|---|---|" + "---|" * len(shares),
    ]  # fmt: skip
    for method, row in both[0].iterrows():
        cells = [f"{row[share]:.3f} / {both[1].loc[method, share]:.3f}" for share in shares]
        shown = f"**{method}**" if method == OURS else str(method)
        lines.append(f"| {shown} | {' | '.join(cells)} | {row[0.0] - row[LOSS_AT]:+.3f} |")
    peer = best_peer(both[0])
    wide = per_set.pivot_table(index="data", columns=["method", "share"], values="roc_auc")
    ahead = ranking.interval((wide[OURS] - wide[peer])[LOSS_AT].to_numpy())
    less = ranking.interval((loss_of(wide, OURS) - loss_of(wide, peer)).to_numpy())
    return [
        *lines, "",
        f"Ours less {peer}, mean over sets and 95 % interval (sets drawn again): AUROC at {LOSS_AT:.0%} missing "
        f"{ranking.signed(*ahead)}; lost {ranking.signed(*less)}.", "",
    ]  # fmt: skip


def loss_of(wide: pd.DataFrame, method: str) -> pd.Series:
    """AUROC lost by a method, per set."""
    return wide[method, 0.0] - wide[method, LOSS_AT]


def likelihoods(per_set: pd.DataFrame) -> list[str]:
    """Each column by its own likelihood, against numbers alone."""
    own = per_set[per_set["method"].isin([OURS, ONE_HOT]) & per_set["data"].isin(MIXED)]
    if own.empty:
        return []
    shares = sorted(own["share"].unique())
    lines = [
        "### The right likelihoods", "",
        "The same preset with each column under its own likelihood, and with standardised numbers and one-hot words, "
        "all of them normal; AUROC / average precision by share of cells missing:", "",
        f"| table | columns | {' | '.join(f'{share:.0%}' for share in shares)} |", "|---|---|" + "---|" * len(shares),
    ]  # fmt: skip
    for (data, method), rows in own.groupby(["data", "method"]):
        cells = [f"{r['roc_auc']:.3f} / {r['average_precision']:.3f}" for _, r in rows.sort_values("share").iterrows()]
        lines.append(f"| {data} | {'own likelihoods' if method == OURS else 'one-hot, normal'} | {' | '.join(cells)} |")
    return [*lines, ""]


def by_set(per_set: pd.DataFrame) -> list[str]:
    """Every set: ours and, of the peers, the best at 30 % over all sets."""
    own = per_set[per_set["method"] != ONE_HOT]
    peer = best_peer(averages(_real(own) if len(_real(own)) else own))
    wide = own.pivot_table(index="data", columns=["method", "share"], values="roc_auc")
    lines = [
        "### Every set", "",
        f"AUROC with none and {LOSS_AT:.0%} missing; {peer} is the best peer over the real sets:", "",
        f"| set | ours, none | ours, {LOSS_AT:.0%} | {peer}, none | {peer}, {LOSS_AT:.0%} |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for data, row in wide.iterrows():
        cells = [f"{row[method, share]:.3f}" for method in (OURS, peer) for share in (0.0, LOSS_AT)]
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return [*lines, ""]
