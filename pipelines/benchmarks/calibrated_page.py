"""The section on calibration: counts of fresh rows beside the beta-binomial law that they should follow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import page
import pandas as pd
import ranking
from scipy.stats import betabinom

SECTION = "Rates that are asked for"
COMMAND = "make bench-calibration"
MAIN_FRACTION = 0.2
INSIDE = 0.95
CASE = ["data", "seed", "group"]


def write(path: Path, table: pd.DataFrame) -> None:
    """Replace the section of the page, and write counts by class beside it as CSV."""
    main = judged(table[table["fraction"] == MAIN_FRACTION])
    lines = [page.measured_on(COMMAND), "", introduction(main), "", *page.goal_table(goals(main))]
    lines += [*false_alarms(main), *p_values(main), *found(main), *fractions(judged(table)), *by_set(main)]
    page.write_section(path, SECTION, lines, title=ranking.TITLE, order=ranking.ORDER)
    counted = main[main["figure"].isin(["alarms", "alarms elsewhere"])]
    columns = [
        "figure",
        "asked",
        "data",
        "seed",
        "group",
        "guarantee",
        "calibration_rows",
        "rows",
        "counted",
        "verdict",
    ]
    counted[columns].sort_values(columns[:5]).to_csv(path.with_name("calibration.csv"), index=False)


def bounds(n_calibration: int, n_rows: int, rate: float) -> tuple[int, int]:
    """Central 95 % of the number of ``n_rows`` fresh rows above the threshold of ``n_calibration`` rows.

    The share of rows above the k-th largest of n scores is Beta(k, n + 1 - k), so the count is beta-binomial; k is
    that of a conformal threshold, floor(rate (n + 1)).
    """
    k = math.floor(rate * (n_calibration + 1) + 1e-9)
    if k == 0:
        return 0, 0
    law = betabinom(n_rows, k, n_calibration + 1 - k)
    return int(law.ppf((1 - INSIDE) / 2)), int(law.ppf((1 + INSIDE) / 2))


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``verdict``: whether a count of a class with a promise is inside, below or above."""
    verdicts = []
    for line in table.itertuples():
        if line.figure not in ("alarms", "p-values", "alarms elsewhere") or line.guarantee != "class":
            verdicts.append("")
            continue
        low, high = bounds(line.calibration_rows, line.rows, line.asked)
        verdicts.append("below" if line.counted < low else "above" if line.counted > high else "inside")
    return table.assign(verdict=verdicts)


def share(own: pd.DataFrame, verdict: str) -> float:
    """Of the lines, the share with this verdict."""
    return float((own["verdict"] == verdict).mean())


def introduction(main: pd.DataFrame) -> str:
    """What was run, and how it is judged."""
    return (
        f"{main['data'].nunique()} sets ({', '.join(sorted(main['data'].unique()))}), {ranking.seeds_run(main)}, "
        "the balanced preset. Half of the normal rows, drawn by "
        "the seed, go to `fit` (a fifth of them calibrates and does nothing else); "
        "the other half, at most 50,000 rows, is fresh. A class whose own n calibration rows set its threshold "
        '(guarantee "class") flags a beta-binomial number of m fresh rows: *inside* is its central 95 %. Rows with '
        "equal scores put a count below, never above. A table with a condition is judged class by class."
    )


def goals(main: pd.DataFrame) -> list[page.Goal]:
    """Counts inside their interval, at every rate."""
    own = main[(main["figure"] == "alarms") & (main["guarantee"] == "class")]
    return [
        page.Goal(f"classes inside, {asked:.0%} asked", np.array([share(lines, "inside")]), INSIDE, "")
        for asked, lines in own.groupby("asked")
    ]


def false_alarms(main: pd.DataFrame) -> list[str]:
    """Realised false-alarm rates by promise."""
    own = main[main["figure"].isin(["alarms", "alarms elsewhere"])]
    named = {"alarms": "fresh rows", "alarms elsewhere": "the test file that comes with the table"}
    lines = [
        "False alarms. The mean over cases (class, set and seed) of the rate, of what the law expects for it, and "
        "verdicts. A class of too few rows borrows from the others (*pooled*) or has no promise (*none*):", "",
        "| rows | asked | guarantee | cases | mean rate | expected | inside | above | below |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (figure, asked, guarantee), cases in own.groupby(["figure", "asked", "guarantee"]):
        rate = (cases["counted"] / cases["rows"]).mean()
        cells = [named[figure], f"{asked:.0%}", guarantee, str(len(cases)), f"{rate:.2%}"]
        cells += verdict_cells(cases) if guarantee == "class" else ["", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def verdict_cells(cases: pd.DataFrame) -> list[str]:
    """The rate expected, and shares of verdicts."""
    n = cases["calibration_rows"] + 1
    expected = (np.floor(cases["asked"] * n + 1e-9) / n).mean()
    return [f"{expected:.2%}", *(f"{share(cases, verdict):.1%}" for verdict in ("inside", "above", "below"))]


def p_values(main: pd.DataFrame) -> list[str]:
    """How often a normal row's p-value is at most a."""
    own = main[(main["figure"] == "p-values") & (main["guarantee"] == "class")]
    lines = [
        "Conformal p-values of fresh rows, classes with a promise of their own at 1 %:", "",
        "| p at most | cases | share of rows | expected | inside | above | below |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for asked, cases in own.groupby("asked"):
        rate = (cases["counted"] / cases["rows"]).mean()
        lines.append(f"| {asked:g} | {len(cases)} | {rate:.4f} | {' | '.join(verdict_cells(cases))} |")
    return [*lines, ""]


def found(main: pd.DataFrame) -> list[str]:
    """False discoveries and power of Benjamini-Hochberg."""
    own = main[main["figure"] == "discoveries"]
    own = own.assign(false=own["counted"] / own["rows"].clip(lower=1))
    lines = [
        "`select(X, false_discovery_rate=…)` on mixes of nine fresh normals and one anomaly (ten draws a fit). Rate: "
        "mean over sets of the share of normals among the rows reported (0 where none is), 95 % interval with sets "
        "drawn again; power: the share of anomalies reported. The procedure holds 0.9 of what is asked, as 0.9 of "
        "the rows are normal; below 1 / (n + 1) no p-value can fall, so few calibration rows report nothing:", "",
        "| asked | guarantee at 1 % | sets | false discovery rate | power |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for (asked, guarantee), cases in own.groupby(["asked", "guarantee"]):
        by_set = cases.groupby("data")[["false", "value"]].mean()
        middle, low, high = ranking.interval(by_set["false"].to_numpy())
        lines.append(
            f"| {asked:.0%} | {guarantee} | {len(by_set)} | {middle:.3f} ({low:.3f} to {high:.3f}) "
            f"| {by_set['value'].mean():.3f} |"
        )
    return [*lines, ""]


def fractions(table: pd.DataFrame) -> list[str]:
    """What more calibration rows cost and bring, on what was run with each share."""
    wanted = table["fraction"].nunique()
    counts = table.groupby(["data", "seed"])["fraction"].transform("nunique")
    every = table[counts == wanted]
    if wanted < 2 or every.empty:
        return []
    runs = every[["data", "seed"]].drop_duplicates()
    lines = [
        f"How many rows calibration should take (`calibration_fraction`), on the {len(runs)} pairs of set and seed run "
        "with each. Width: standard deviation of realised less asked rate, over the classes that have a promise of "
        "their own with every share:", "",
        "| share | AUROC | classes that hold 1 % by themselves | width at 1 % | width at 5 % |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    shared = _promised_everywhere(every, wanted)
    for fraction, own in every.groupby("fraction"):
        auroc = own[own["figure"] == "AUROC"].groupby("data")["value"].mean().mean()
        alarms = own[own["figure"] == "alarms"]
        holding = int((alarms[alarms["asked"] == 0.01]["guarantee"] == "class").sum())
        cells = [f"{fraction:g}", f"{auroc:.4f}", f"{holding} of {(alarms['asked'] == 0.01).sum()}"]
        for asked in (0.01, 0.05):
            cases = alarms[(alarms["asked"] == asked)].set_index(CASE)
            cases = cases[cases.index.isin(shared[asked])]
            spread = (cases["counted"] / cases["rows"] - asked).std()
            cells.append("too few" if np.isnan(spread) else f"{spread:.2%}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _promised_everywhere(every: pd.DataFrame, wanted: int) -> dict[float, pd.Index]:
    """By rate, the cases that have a promise of their own with every share."""
    own = every[(every["figure"] == "alarms") & (every["guarantee"] == "class")]
    return {
        float(asked): (sizes := cases.groupby(CASE).size()).index[sizes == wanted]
        for asked, cases in own.groupby("asked")
    }


def by_set(main: pd.DataFrame) -> list[str]:
    """Realised rates of every set and class, means over seeds."""
    own = main[main["figure"] == "alarms"].assign(rate=main["counted"] / main["rows"])
    lines = [
        "Every set and class, means over seeds: rate at 1 % and 5 % asked, and whose rows hold it:", "",
        "| set | class | calibration rows | fresh rows | 1 % | 5 % |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (data, group), cases in own.groupby(["data", "group"], sort=False):
        cells = [str(data), str(group), f"{cases['calibration_rows'].mean():.0f}", f"{cases['rows'].mean():.0f}"]
        for _, line in cases.groupby("asked"):
            cells.append(f"{line['rate'].mean():.2%} ({', '.join(sorted(line['guarantee'].unique()))})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
