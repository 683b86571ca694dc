"""Programs as a person starts them, but from a process that has imported everything already; see `warm_program`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIPELINES = ROOT / "pipelines"
BENCHMARKS = PIPELINES / "benchmarks"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def python(
    *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments, a script or ``-c`` and code, in a folder."""
    command, env = ["python", *map(str, arguments)], {**(os.environ if environment is None else environment)}
    told = json.dumps([command, str(folder), {**env, **ONE_THREAD}]).encode()
    with socket.socket(socket.AF_UNIX) as server, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        server.connect(_address())
        with open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(server, [len(told).to_bytes(8, "big")], streams)
        server.sendall(told)
        code = server.recv(1)
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess(
            command, code[0] if code else -1, out.read().decode("utf-8"), err.read().decode("utf-8")
        )


def wide() -> dict[str, str]:
    """The environment with a terminal of 120 columns."""
    return {**os.environ, "COLUMNS": "120"}


def of_benchmarks(code: str, *arguments: object) -> list[str]:
    """The lines that a piece of code prints that imports the benchmarks' own parts."""
    ran = python("-c", code, *arguments, folder=BENCHMARKS)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@functools.cache
def _address() -> str:
    """Of the socket of a process that serves this one, started when it is first needed."""
    folder = tempfile.mkdtemp()  # the address of a socket may have about 100 characters
    address = str(Path(folder) / "socket")
    command = [sys.executable, str(Path(__file__).with_name("warm_program.py")), address]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD})
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.terminate)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return address
