"""What users rely on; a change here is a change of the public interface and is made on purpose."""

import inspect
import subprocess
import sys

import anomaly_cvae
from anomaly_cvae import CVAEDetector, presets

PARAMETERS = [
    "condition_columns", "conditioning", "unseen_class", "missing_condition", "score_kind", "contamination",
    "false_alarm_rate", "n_estimators", "part_weights", "linear_start", "latent_dim", "hidden_dims", "likelihoods",
    "column_kinds", "ignore_columns",
    "channels", "condition_on_observed", "inference_head", "prior", "objective", "train_samples", "kl_weight",
    "free_bits", "input_noise", "mask_rate", "mask_shapes", "scale_floor", "n_samples", "max_steps", "batch_size",
    "learning_rate", "patience", "validation_fraction", "calibration_fraction", "checkpoint", "device", "dtype",
    "mixed_precision", "random_state", "verbose",
]  # fmt: skip
METHODS = [
    "alarm_columns", "calibrated_score", "class_negative_elbo", "condition_proba", "contrast", "decision_function",
    "edit", "explain", "explain_pixels", "fit", "fit_files", "fit_predict", "fit_transform", "get_feature_names_out",
    "impute",
    "impute_draws", "impute_intervals", "infer_schema", "interpolate", "latent_map", "load", "negative_elbo",
    "negative_log_likelihood", "p_values", "predict", "recalibrate", "reconstruct", "sample", "save", "score_samples",
    "score_table", "select", "top_columns", "transform",
]  # fmt: skip


def test_package_exports():
    assert anomaly_cvae.__all__ == ["CVAEDetector", "__version__", "errors", "presets"]
    for name in anomaly_cvae.__all__:
        assert getattr(anomaly_cvae, name) is not None
    assert dir(anomaly_cvae) == sorted(anomaly_cvae.__all__)


def test_detector_parameters():
    assert list(inspect.signature(CVAEDetector).parameters) == PARAMETERS


def test_detector_methods():
    ours = [part for part in CVAEDetector.__mro__ if part.__module__.startswith("anomaly_cvae.")]
    own = {name for part in ours for name in vars(part)}
    own = [name for name in own if callable(getattr(CVAEDetector, name))]
    # scikit-learn adds set_..._request for metadata routing.
    assert sorted(name for name in own if not name.startswith(("_", "set_"))) == METHODS


def test_every_parameter_is_documented():
    for name in PARAMETERS:
        assert name in CVAEDetector.__doc__, name


def test_presets_are_parameters():
    for preset in (presets.FAST, presets.BALANCED, presets.BEST, presets.IMAGES):
        CVAEDetector(**preset)


def test_import_is_lazy():
    code = (
        "import sys, anomaly_cvae; "
        "print(sorted(m for m in ('torch', 'pandas', 'numpy', 'sklearn', 'mlflow') if m in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_core_works_without_the_optional_packages(tmp_path):
    code = f"""
import builtins
really_import = builtins.__import__
def without(name, *args, **kwargs):
    if name.split(".")[0] in ("mlflow", "pyarrow", "typer", "rich", "matplotlib", "plotly", "onnx", "pydantic", "yaml"):
        raise ModuleNotFoundError(name)
    return really_import(name, *args, **kwargs)
builtins.__import__ = without
import numpy as np, pandas as pd
from anomaly_cvae import CVAEDetector
rng = np.random.default_rng(0)
frame = pd.DataFrame({{"a": rng.normal(size=60), "kind": list("xy") * 30}})
detector = CVAEDetector(["kind"], max_steps=10, hidden_dims=(8,), verbose=1, random_state=0).fit(frame)
saved = detector.save({str(tmp_path / "model")!r})
loaded = CVAEDetector.load(saved)
assert (loaded.score_samples(frame) == detector.score_samples(frame)).all()
loaded.explain(frame), loaded.sample(3), loaded.contrast(frame)
print("fine")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "fine", ran.stderr
