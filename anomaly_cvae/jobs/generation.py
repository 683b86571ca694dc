"""New rows from a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from anomaly_cvae.errors import ConditionError
from anomaly_cvae.frames import Level
from anomaly_cvae.inputs import nearest
from anomaly_cvae.jobs.models import OpenModel
from anomaly_cvae.schema import Condition


def generate_rows(
    model: OpenModel,
    n: int,
    condition: Sequence[str] | None,
    random_state: int,
    *,
    noise: bool = True,
    same_z: bool = False,
) -> pd.DataFrame:
    """Draw ``n`` rows, of one class if its values are given, as text: in the model's order, or as NAME=VALUE.

    ``noise`` and ``same_z`` as in `CVAEDetector.sample`.

    Raises
    ------
    ConditionError
        If the number of values, or a value, is not one of the model's.
    """
    values = condition_values(model, condition)
    return sampled(model, n, values, random_state, noise=noise, same_z=same_z)


def condition_values(model: OpenModel, condition: Sequence[str] | None) -> tuple[Level, ...] | None:
    """The condition that all rows are to have, one level each; None for as in training.

    Raises
    ------
    ConditionError
        As `generate_rows` does.
    """
    conditions = model.detector.schema_.conditions
    if condition is None:
        unspanned = [str(c.name) for c in conditions if c.kind != "categorical"]
        if unspanned:
            raise ConditionError(f"say for which {', '.join(str(c.name) for c in conditions)} (--condition)")
        return None
    names = [str(c.name) for c in conditions]
    condition = _in_order(condition, names)
    if len(condition) != len(conditions):
        raise ConditionError(
            f"this model has {len(names)} condition(s), {names}; {len(condition)} value(s) came "
            "(--condition VALUE in this order, or NAME=VALUE, once for each)"
        )
    return tuple(_value(text, c) for text, c in zip(condition, conditions, strict=True))


def named_values(model: OpenModel, given: Sequence[str], flag: str) -> dict[str, Level]:
    """Some of the conditions, each as NAME=VALUE, or VALUE alone where the model has but one.

    Raises
    ------
    ConditionError
        If there is no such condition, or value.
    """
    conditions = {str(c.name): c for c in model.detector.schema_.conditions}
    if given and not conditions:
        raise ConditionError(f"{flag} {given[0]}: this model has no condition")
    values: dict[str, Level] = {}
    for text in given:
        name = next((name for name in conditions if text.startswith(f"{name}=")), None)
        if name is None and len(conditions) == 1:
            name, text = next(iter(conditions)), f"{next(iter(conditions))}={text}"
        if name is None:
            raise ConditionError(f"{flag} {text}: say NAME=VALUE{nearest(text.partition('=')[0], conditions)}")
        if name in values:
            raise ConditionError(f"{flag} {text}: {name!r} is given twice")
        values[name] = _value(text.removeprefix(f"{name}="), conditions[name])
    return values


def sampled(
    model: OpenModel, n: int, condition: Any, random_state: int, *, noise: bool = True, same_z: bool = False
) -> pd.DataFrame:
    """`CVAEDetector.sample` as a table."""
    detector = model.reader
    drawn = detector.sample(n, condition=condition, random_state=random_state, noise=noise, same_z=same_z)
    if isinstance(drawn, pd.DataFrame):
        return drawn
    return pd.DataFrame(drawn, columns=[c for c in detector.layout_.columns if c not in detector.layout_.ignored])


def _value(text: str, condition: Condition) -> Level:
    name = str(condition.name)
    return _number(text, name) if condition.kind == "continuous" else _level(text, condition.levels, name)


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
