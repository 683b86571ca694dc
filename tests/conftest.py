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


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: begun last, it would keep one worker busy when all others are done."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")
