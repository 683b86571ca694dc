"""What people read of a result: nothing is cut without a word, and words that promise are explained."""

from pathlib import Path

import pandas as pd
import pytest

from anomaly_cvae.jobs.thresholds import Recalibrated
from anomaly_cvae.report import Report


def said_of(guarantees: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    thresholds = pd.DataFrame(
        {
            "threshold": 3.0, "guarantee": guarantees, "calibration_rows": 200, "rule": "elbo: a rate",
            "set_at": "2026-01-01", "set_by": "me",
        },
        index=pd.Index([f"kind {i}" for i in range(len(guarantees))], name="class"),
    )  # fmt: skip
    with Report() as report:
        report.recalibrated(Recalibrated(thresholds, thresholds, Path("model"), "0" * 64))
    return " ".join(capsys.readouterr().out.split())


def test_classes_that_are_not_shown_are_counted(capsys) -> None:
    assert "more classes" not in said_of(["class"] * 20, capsys)
    said = said_of(["class"] * 25, capsys)
    assert "kind 19" in said
    assert "kind 20" not in said
    assert "… and 5 more classes; --json has all of them" in said


def test_guarantees_other_than_the_class_s_own_are_explained(capsys) -> None:
    assert "one scale" not in said_of(["class"], capsys)
    said = said_of(["class", "pooled", "none"], capsys)
    assert "pooled: held by the scores of all classes" in said
    assert "none: too few calibration rows" in said
