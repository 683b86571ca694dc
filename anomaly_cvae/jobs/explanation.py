"""Why rows were flagged: the columns in nats, what was expected instead, and where a row would be normal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.needs import Needs
from anomaly_cvae.batch.source import find_files
from anomaly_cvae.detector import CVAEDetector
from anomaly_cvae.errors import DataError
from anomaly_cvae.explain import ALARM_COLUMNS, ordered_alarms
from anomaly_cvae.fitted import can_contrast
from anomaly_cvae.frames import BoolArray
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.jobs.rows import collect

IMAGE_CELL = "(image)"
"""What stands for an image where cells are read as text."""
MOST_ROWS = 20
TOP_COLUMNS = 3
MOST_FOR_ALARM_COLUMNS, MOST_IMAGES_FOR_ALARM_COLUMNS = 20_000, 1_000
"""Flagged rows, the first ones, of which it is asked what drives the alarms: a row costs some twenty passes."""


@dataclass(frozen=True)
class Explanation:
    """The most surprising rows, and which columns drive the alarms of each class.

    ``rows``: one line per row: ``row`` (its number or index), ``condition``, ``negative_elbo``, ``score``,
    ``threshold``, ``p_value``, ``is_anomaly``, ``most_normal_as`` (the class under which it is least
    surprising) and ``nats_there``. ``columns``: for each of these rows its top columns, as
    `CVAEDetector.top_columns` gives them, images in a word. ``alarm_columns``: as `CVAEDetector.alarm_columns`,
    of the first `most_alarms` flagged rows.
    ``frame``: the rows themselves. ``faults`` maps pictures that could not be used to what is wrong with them.
    """

    rows: pd.DataFrame
    columns: pd.DataFrame
    alarm_columns: pd.DataFrame
    n_rows: int = 0
    n_alarms: int = 0
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> pd.DataFrame:
        """One line per row, to be read: its verdict, and its top columns in words."""
        told = self.columns.assign(why=[_in_words(c) for c in self.columns.to_dict(orient="records")])
        wide = told.pivot(index="row", columns="rank", values="why") if len(told) else pd.DataFrame()
        kept = ("row", "condition", "labelled", "is_anomaly", "score", "threshold", "p_value", "most_normal_as")
        rows = self.rows[[name for name in kept if name in self.rows.columns]]
        return rows.join(wide.add_prefix("why_"), on="row").round(4) if len(rows) else rows

    @property
    def table(self) -> pd.DataFrame:
        """Both tables as one: a line per row and top column."""
        return self.rows.merge(self.columns, on="row", how="left") if len(self.rows) else self.rows


def _in_words(column: Mapping[Any, Any]) -> str:
    """``speed 2,833 (expected 1,474; 1,365 … 1,583): 17.3 nats``; empty for what is no reason."""
    if column["repair_nats"] <= 0 and column["rank"] > 1:
        return ""
    if IMAGE_CELL in (column["observed"], column["expected"]):
        return f"{column['column']}: {column['repair_nats']:.1f} nats"
    between = "" if pd.isna(column["low"]) else f"; {column['low']:,.4g} … {column['high']:,.4g}"
    observed, expected = (
        f"{v:,.5g}" if isinstance(v, float) else str(v) for v in (column["observed"], column["expected"])
    )
    return f"{column['column']} {observed} (expected {expected}{between}): {column['repair_nats']:.1f} nats"


def most_surprising(scored: pd.DataFrame, n: int) -> pd.DataFrame:
    """The ``n`` rows furthest above their threshold for their p-value, the most surprising first."""
    above = (scored["score"] - scored["threshold"]).rename("above")
    order = scored[["p_value"]].join(above).sort_values(["p_value", "above"], ascending=[True, False], kind="stable")
    return scored.loc[order.index[:n]]


def explain_rows(
    detector: CVAEDetector,
    frame: pd.DataFrame,
    scored: pd.DataFrame,
    *,
    n_rows: int = MOST_ROWS,
    n_columns: int = TOP_COLUMNS,
    is_anomaly: BoolArray | None = None,
) -> Explanation:
    """Explain the most surprising rows of a scored table; rows are known by the index of ``frame``.

    ``is_anomaly`` (N,) adds what their label says.
    """
    names = frame.index.to_numpy()  # it may hold a label twice
    frame, scored = frame.reset_index(drop=True), scored.reset_index(drop=True)
    top = most_surprising(scored, n_rows)
    flagged = np.flatnonzero(scored["is_anomaly"].to_numpy())
    alarms = detector.alarm_columns(frame.iloc[flagged[: most_alarms(detector)]])
    rows, columns = describe(detector, frame.loc[top.index], top, n_columns)
    if is_anomaly is not None:
        rows["labelled"] = np.where(is_anomaly[rows["row"]], "anomaly", "normal")
    rows["row"], columns["row"] = names[rows["row"]], names[columns["row"]]
    return Explanation(rows, columns, alarms, len(frame), len(flagged), frame.loc[top.index])


def most_alarms(detector: CVAEDetector) -> int:
    """Flagged rows of which it is asked what drives the alarms."""
    return MOST_IMAGES_FOR_ALARM_COLUMNS if detector.schema_.images else MOST_FOR_ALARM_COLUMNS


def describe(
    detector: CVAEDetector, frame: pd.DataFrame, scored: pd.DataFrame, n_columns: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One line per row, and one per row and top column."""
    rows = scored.drop(columns=["contrast", "top_column", "top_nats"], errors="ignore").copy()
    rows.insert(0, "row", frame.index.to_numpy())
    if can_contrast(detector.schema_) and len(frame):
        by_class = detector.class_negative_elbo(frame)
        rows["most_normal_as"] = by_class.idxmin(axis=1).to_numpy()
        rows["nats_there"] = by_class.min(axis=1).to_numpy()
    columns = detector.top_columns(frame, n=n_columns) if len(frame) else pd.DataFrame({"row": []})
    images = columns["column"].isin([c.name for c in detector.schema_.images]) if len(columns) else None
    if images is not None and images.any():
        columns[["observed", "expected"]] = columns[["observed", "expected"]].where(~images, IMAGE_CELL)
    return rows.reset_index(drop=True), columns


def explain_tables(
    model: OpenModel,
    inputs: Sequence[str],
    *,
    rows: Sequence[int] = (),
    n_rows: int = MOST_ROWS,
    n_columns: int = TOP_COLUMNS,
    csv_format: CsvFormat | None = None,
) -> Explanation:
    """Explain tables in files, batch by batch: some ``rows`` by number, or the most surprising ones.

    Row numbers count from 0 through all files in their order.

    Raises
    ------
    DataError
        If a file cannot be read, or a row asked for is not there.
    """
    detector, asked, faults = model.reader, set(rows), dict[str, str]()
    needs = Needs.of(detector)
    kept: list[tuple[pd.DataFrame, pd.DataFrame]] = []
    alarms: list[pd.DataFrame] = []
    first = n_alarms = 0
    files = find_files(list(inputs), model.csv_format(csv_format or CsvFormat()), called=needs.called)
    starts: list[int] = []
    for file in files:
        starts.append(first)
        for batch in needs.batches(file, on_fault=collect(faults)):
            frame = needs.table(batch.frame)
            frame = frame.set_axis(pd.RangeIndex(first, first + len(frame)), axis=0)
            first += len(frame)
            scored = detector.score_table(frame)
            flagged = frame[scored["is_anomaly"].to_numpy()]
            alarms.append(detector.alarm_columns(flagged.head(max(most_alarms(detector) - n_alarms, 0))))
            n_alarms += len(flagged)
            chosen = scored.loc[scored.index.isin(asked)] if asked else most_surprising(scored, n_rows)
            kept.append((frame.loc[chosen.index], chosen))
            if not asked:
                kept = [_best(kept, n_rows)]
    _require_rows(asked, first)
    frame, scored = (pd.concat(parts) for parts in zip(*kept, strict=True))
    described, columns = describe(detector, frame, scored, n_columns)
    if len(files) > 1:
        places = np.searchsorted(starts, described["row"].to_numpy(dtype=np.int64), side="right") - 1
        described["file"] = [str(files[place].path) for place in places]
        described["row_in_file"] = described["row"].to_numpy(dtype=np.int64) - np.array(starts)[places]
    return Explanation(described, columns, merged(alarms), first, n_alarms, frame, faults)


def _best(parts: list[tuple[pd.DataFrame, pd.DataFrame]], n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame, scored = (pd.concat(part) for part in zip(*parts, strict=True))
    top = most_surprising(scored, n)
    return frame.loc[top.index], top


def _require_rows(asked: set[int], n_rows: int) -> None:
    beyond = sorted(row for row in asked if not 0 <= row < n_rows)
    if beyond:
        raise DataError(f"there is no row {beyond[0]}: the tables have {n_rows:,} rows, counted from 0")


def merged(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Alarm columns of several batches as one table, the strongest first."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=ALARM_COLUMNS)
    together = pd.concat(parts, ignore_index=True)
    together["total"] = together["repair_nats"] * together["top"]
    summed = together.groupby(["class", "column"], as_index=False)[["top", "total"]].sum()
    summed["repair_nats"] = summed["total"] / summed["top"]
    summed["alarms"] = summed.groupby("class")["top"].transform("sum")
    return ordered_alarms(summed)
