"""New rows from a saved model."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from anomaly_cvae.errors import ConditionError
from anomaly_cvae.frames import Level
from anomaly_cvae.jobs.models import OpenModel


def generate_rows(model: OpenModel, n: int, condition: Sequence[str] | None, random_state: int) -> pd.DataFrame:
    """Draw ``n`` rows, of one class if its values are given, as text: in the model's order, or as NAME=VALUE.

    Raises
    ------
    ConditionError
        If the number of values, or a value, is not one of the model's.
    """
    detector, conditions = model.detector, model.detector.schema_.conditions
    values: tuple[Level, ...] | None = None
    if condition is not None:
        names = [str(c.name) for c in conditions]
        condition = _in_order(condition, names)
        if len(condition) != len(conditions):
            raise ConditionError(
                f"this model has {len(names)} condition(s), {names}; {len(condition)} value(s) came "
                "(--condition VALUE in this order, or NAME=VALUE, once for each)"
            )
        values = tuple(
            _number(text, str(c.name)) if c.kind == "continuous" else _level(text, c.levels, str(c.name))
            for text, c in zip(condition, conditions, strict=True)
        )
    elif detector.schema_.continuous_conditions:
        raise ConditionError(f"say for which {', '.join(str(c.name) for c in conditions)} (--condition)")
    drawn = detector.sample(n, condition=values, random_state=random_state)
    if isinstance(drawn, pd.DataFrame):
        return drawn
    return pd.DataFrame(drawn, columns=[c for c in detector.layout_.columns if c not in detector.layout_.ignored])


def _in_order(given: Sequence[str], names: list[str]) -> Sequence[str]:
    named = {name: text.removeprefix(f"{name}=") for text in given for name in names if text.startswith(f"{name}=")}
    return [named[name] for name in names] if len(named) == len(names) == len(given) else given


def _level(text: str, levels: Sequence[Level], name: str) -> Level:
    spelled = {str(level): level for level in levels}
    if text not in spelled:
        raise ConditionError(f"condition {name!r} has no value {text!r}; it has {', '.join(list(spelled)[:20])}")
    return spelled[text]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConditionError(f"condition {name!r} is a number, not {text!r}") from error
