"""One thread per test process: small matrix products gain nothing from two, and lose much when the machine is busy."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# A shell that starts a job in the background has it ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


SLOWEST = (
    "test_docs.py", "test_studies_digits.py", "test_studies_anomalies.py", "test_study_faces.py", "test_throughput.py",
    "test_pipelines.py", "test_runs.py", "test_promises.py", "test_cli.py", "test_jobs.py",
)  # fmt: skip
"""Files whose tests start programs or train for long."""


def pytest_collection_modifyitems(items):
    """Files that take longest come first: begun last, one would keep a worker busy when all others are done."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
