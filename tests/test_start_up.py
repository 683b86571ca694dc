"""What is imported when: seconds are for the benchmark, modules are for a test."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from anomaly_cvae import CVAEDetector

HEAVY = ("torch", "numpy", "pandas", "scipy", "sklearn", "pyarrow", "mlflow", "matplotlib", "plotly", "yaml")
OPTIONAL = ("mlflow", "matplotlib", "plotly", "typer", "pydantic", "yaml", "onnx", "onnxruntime")
"""Without pyarrow, which pandas imports by itself."""
COMPILER = ("torch._inductor", "sympy")
"""Parts of torch that cost more than all the rest to import, and that nothing here needs before a fit."""


def imported(code: str, *packages: str) -> set[str]:
    """Those of ``packages`` that a fresh process has imported after ``code``."""
    asked = f"import sys\n{code}\nprint('imported:', *[name for name in {packages!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].removeprefix("imported:").split())


def test_the_package_imports_nothing_heavy():
    assert imported("import anomaly_cvae", *HEAVY, "typer", "rich") == set()


def test_its_errors_and_presets_import_nothing_heavy():
    assert imported("from anomaly_cvae import errors, presets; errors.DataError, presets.FAST", *HEAVY) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["score", "--help"]])
def test_the_command_line_speaks_without_anything_heavy(arguments):
    code = f"""
sys.argv = ["anomaly-cvae", *{arguments!r}]
from anomaly_cvae.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
"""
    assert imported(code, *HEAVY) == set()


def test_the_detector_imports_no_optional_package():
    assert imported("from anomaly_cvae import CVAEDetector", *OPTIONAL) == set()


def test_the_detector_imports_no_clustering_nor_metrics():
    """They bring half of scikit-learn with them, and are for fitting and evaluating."""
    code = "import sklearn.base; from anomaly_cvae import CVAEDetector"
    assert imported(code, "sklearn.cluster", "sklearn.metrics", "sklearn.linear_model") == set()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=list("abc"))
    frame["kind"] = list("xy") * 30
    CVAEDetector(["kind"], max_steps=5, hidden_dims=(8,), random_state=0).fit(frame).save(folder / "model")
    return folder / "model"


def test_scoring_with_a_saved_model_imports_no_compiler_and_no_optional_package(saved):
    code = f"""
import pandas as pd
from anomaly_cvae import CVAEDetector
detector = CVAEDetector.load({str(saved)!r}, device="cpu")
scores = detector.score_samples(pd.DataFrame({{"a": [0.1], "b": [0.2], "c": [0.3], "kind": ["x"]}}))
assert scores.shape == (1,)
"""
    assert imported(code, *COMPILER, *OPTIONAL) == set()


@pytest.mark.parametrize(
    ("x", "options"),
    [("normal(size=(60, 3))", ""), ("random(size=(40, 8, 8))", "objective='vae_gan', channels=(4,)")],
)
def test_fitting_imports_no_compiler(x, options):
    """torch's optimisers bring it on their first step, which takes more than a second."""
    code = f"""
import numpy as np
from anomaly_cvae import CVAEDetector
x = np.random.default_rng(0).{x}
CVAEDetector(max_steps=3, hidden_dims=(8,), random_state=0, {options}).fit(x)
"""
    assert imported(code, "torch._dynamo", *COMPILER) == set()
