"""What a training job is to do: checked, from a YAML file and from flags, which win."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from anomaly_cvae.errors import MissingDependencyError, ParameterError
from anomaly_cvae.inputs import nearest

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
except ImportError as error:
    raise MissingDependencyError("jobs and the command line need pydantic: pip install pydantic") from error

Value = bool | int | float | str
EXPERIMENT = "anomaly_cvae"


class CsvConfig(BaseModel):
    """How CSV files are written; what is left out is found out."""

    model_config = ConfigDict(extra="forbid")

    delimiter: str | None = None
    encoding: str | None = None
    decimal: str | None = None
    thousands: str | None = None


class TableConfig(BaseModel):
    """A table and its label.

    ``anomaly`` and ``normal`` are values of the label, or a comparison such as ``"<= 25"``.
    """

    model_config = ConfigDict(extra="forbid")

    data: list[str] = Field(default_factory=list, description="files, folders or patterns")
    label: str | None = Field(None, description="column that says which rows are anomalies")
    anomaly: list[Value] | None = Field(None, description="label values that mean an anomaly, or a comparison")
    normal: list[Value] | None = Field(None, description="label values that mean normal, or a comparison")
    csv: CsvConfig = Field(default_factory=CsvConfig, description="delimiter, encoding, decimal, thousands")

    @field_validator("data", "anomaly", "normal", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int, float, bool, Path)) else value


class TrainConfig(TableConfig):
    """Everything `train` needs."""

    name: str = Field("model", description="of the model, its folder and its run")
    output: str | None = Field(None, description="folder of the saved model; default: ./NAME")
    condition: list[str] = Field(default_factory=list, description="columns that normal depends on")
    ignore: list[str] = Field(default_factory=list, description="columns that are neither x nor condition")
    test_data: list[str] = Field(default_factory=list, description="labelled rows to evaluate on")
    test_fraction: float = Field(0.3, ge=0, lt=1, description="share of labelled normals kept for evaluation")
    train_on_anomalies: bool = Field(False, description="leave labelled anomalies in the training rows")
    preset: Literal["fast", "balanced", "best", "images"] = Field(
        "balanced", description="size and number of the networks, and time; images where there are any"
    )
    column_kinds: dict[str, str] = Field(default_factory=dict, description="column: kind, where inferred wrongly")
    likelihoods: dict[str, str] = Field(default_factory=dict, description="column: likelihood")
    detector: dict[str, Any] = Field(default_factory=dict, description="further parameters of CVAEDetector")
    random_state: int = Field(0, ge=0, description="seed of the split and of the training")
    tracking: bool = Field(True, description="log an MLflow run")
    experiment: str | None = Field(None, description="MLflow experiment")
    register_as: str | None = Field(None, alias="register", description="registered model to add a version to")
    log_rows: bool = Field(True, description="let cells of rows into MLflow")
    tags: dict[str, str] = Field(default_factory=dict, description="of the run")

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @field_validator("condition", "ignore", "test_data", mode="before")
    @classmethod
    def _names_are_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value

    @property
    def experiment_name(self) -> str:
        """The MLflow experiment: as given, or as MLFLOW_EXPERIMENT_NAME says."""
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT

    @property
    def folder(self) -> Path:
        """Where the model is saved."""
        return Path(self.output or self.name)

    def detector_parameters(self) -> dict[str, Any]:
        """Keywords of `CVAEDetector`.

        Raises
        ------
        ParameterError
            If ``detector`` names no parameter, or one that has a place of its own.
        """
        from anomaly_cvae import CVAEDetector, presets

        own = {
            "condition_columns": "condition",
            "ignore_columns": "ignore",
            "column_kinds": "column_kinds",
            "likelihoods": "likelihoods",
            "random_state": "random_state",
        }
        known = set(CVAEDetector().get_params()) - set(own)
        for name in self.detector:
            if name in own:
                raise ParameterError(f"detector.{name}: write it as {own[name]!r}, one level up")
            if name not in known:
                raise ParameterError(f"detector.{name}: there is no such parameter{nearest(name, sorted(known))}")
        preset: dict[str, Any] = getattr(presets, self.preset.upper())
        # On a command line and in a service one stray class must not end the job.
        policy = {"unseen_class": "anomaly"}
        return {
            **preset,
            **policy,
            "column_kinds": self.column_kinds or None,
            "likelihoods": self.likelihoods or "auto",
            "random_state": self.random_state,
            **self.detector,
        }


def load_config(path: str | Path | None, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration in a YAML file, overridden by what is ``given`` (None: not given).

    Raises
    ------
    ParameterError
        Naming the key, what is wrong with it, and the nearest key there is.
    """
    written = _read_yaml(Path(path)) if path is not None else {}
    flags = {name: value for name, value in given.items() if value is not None and value != [] and value != {}}
    for name in ("csv", "detector", "column_kinds", "likelihoods", "tags"):
        if isinstance(written.get(name), Mapping) and isinstance(flags.get(name), Mapping):
            flags[name] = {**written[name], **flags[name]}
    try:
        return TrainConfig.model_validate({**written, **flags})
    except ValidationError as error:
        raise ParameterError(_explained(error, path)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{path}: {error.strerror.lower() if error.strerror else error}") from error
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not readable as YAML: it is no text in UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ParameterError(f"{path}{where} is not readable as YAML: {what}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold keys and values, not {type(content).__name__}")
    return content


def _explained(error: ValidationError, path: str | Path | None) -> str:
    lines = []
    for fault in error.errors():
        place = [str(part) for part in fault["loc"]]
        model = CsvConfig if len(place) > 1 and place[0] == "csv" else TrainConfig
        names = {field.alias or name for name, field in model.model_fields.items()}
        if fault["type"] == "extra_forbidden":
            lines.append(f"{'.'.join(place)}: there is no such key{nearest(place[-1], sorted(names))}")
        else:
            lines.append(f"{'.'.join(place)}: {fault['msg'].lower()}, not {fault['input']!r}")
    return (f"{path}: " if path is not None else "") + "; ".join(lines)
