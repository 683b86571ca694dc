"""`anomaly-cvae` and `python` from a process that has imported everything already: they start in no time.

    python warm_program.py SOCKET

Each client sends the program's name, its arguments, folder and environment, and its standard streams; a fork runs the
program with these and answers with the exit code. Forking is safe here: with OMP_NUM_THREADS=1 no thread of torch has
been started. One command at a time: none may wait for another.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

CLIENT = r"""#!{python} -ISs
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([["anomaly-cvae", *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
server.sendall(told)
code = server.recv(1)
sys.exit(code[0] if code else 70)
"""


def write_client(place: Path, address: Path) -> None:
    """A program of that name which has the server at ``address`` do the work."""
    place.write_text(CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
    place.chmod(0o755)


def run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """The program as a process of its own would run it: exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Those of the server know what it was started on: a file can be sought in, a pipe cannot.
    with (
        open(0, closefd=False) as sys.stdin,
        open(1, "w", closefd=False) as sys.stdout,
        open(2, "w", closefd=False) as sys.stderr,
    ):
        return of_program(folder, environment, arguments)


def of_program(folder: str, environment: dict[str, str], arguments: list[str]) -> int:
    """Exit code of one command."""
    os.environ.clear()
    os.environ.update(environment)
    program, *sys.argv = arguments
    try:
        os.chdir(folder)
        if program == "python":
            as_python(sys.argv)
        else:
            from anomaly_cvae import cli

            sys.argv = arguments
            cli.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def as_python(arguments: list[str]) -> None:
    """What the interpreter does with these: a script, or ``-c`` and code; but for what waits for its end."""
    assert arguments[0] == "-c" or not arguments[0].startswith("-"), arguments[0]
    is_code = arguments[0] == "-c"
    sys.path[0] = "" if is_code else str(Path(arguments[0]).parent)
    if is_code:
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def answer(client: socket.socket) -> None:
    """One command: told its length and streams first, then what to do."""
    told, streams, _, _ = socket.recv_fds(client, 8, 3)
    length, message = int.from_bytes(told, "big"), b""
    while len(message) < length:
        part = client.recv(length - len(message))
        if not part:
            return  # the client has ended
        message += part
    child = os.fork()
    if not child:
        os._exit(run(streams, *json.loads(message)))
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):
        client.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF]))


def every_module() -> list[str]:
    """Those of the package."""
    import anomaly_cvae

    return [found.name for found in pkgutil.walk_packages(anomaly_cvae.__path__, "anomaly_cvae.")]


def main() -> None:
    """Serve until told to end."""
    for module in ("mlflow.sklearn", *every_module()):
        importlib.import_module(module)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client:
                answer(client)


if __name__ == "__main__":
    main()
