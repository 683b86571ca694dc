"""The README's example runs as written and does what its comments say."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> dict:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        exec(code.group(1), names)
        names["saved"] = Path("machines").resolve()
    return names


def test_the_hot_fridge_is_the_anomaly(example):
    detector, new = example["detector"], example["new"]
    np.testing.assert_array_equal(detector.predict(new), [-1, 1, 1])
    contrast = detector.contrast(new)
    assert contrast[0] > 10
    assert (contrast[1:] < 0).all()


def test_the_temperature_is_to_blame(example):
    top = example["detector"].top_columns(example["new"].head(1), n=1).iloc[0]
    assert (top["column"], top["observed"]) == ("temperature", 80.0)
    assert top["low"] < 4.0 < top["high"] < 20.0
    assert 2.0 < top["expected"] < 6.0


def test_the_model_is_saved_where_it_says(example):
    assert (example["saved"] / "manifest.json").is_file()
