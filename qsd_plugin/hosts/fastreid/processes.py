"""Child processes that end together: the first failure stops the others, and no child outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FrameType

_POLL_S = 0.1
_GRACE_S = 10.0  # between asking a child to end and ending it
_PARENT_POLL_S = 1.0


def run_all(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
    """Run ``command`` once per environment, at the same time, and wait for all.

    Args:
        command: Program and arguments.
        environments: Variables to add to this process's own, one mapping per child.

    Raises:
        SystemExit: A child failed; carries its exit code (128 + signal number if a signal ended it). The others have
            been terminated. Their output has gone to this process's own.
    """
    children: list[subprocess.Popen[bytes]] = []
    with _termination_raises():
        try:
            for environment in environments:
                # Not a comprehension: if the second does not start, the first must be known to be ended.
                children.append(subprocess.Popen(command, env={**os.environ, **environment}))  # noqa: PERF401
            failed = _first_failure(children)
        finally:
            _end(children)
    if failed is not None:
        rank, code = failed
        code = 128 - code if code < 0 else code
        print(
            f"Process {rank} of {len(children)} failed with exit code {code}; see its message above.", file=sys.stderr
        )
        raise SystemExit(code)


def exit_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed without a chance to end its children."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with closing(socket.socket()) as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """Whether this machine can listen on ``port`` of its address ``host``."""
    with closing(socket.socket()) as server:
        # As the process group's own server does it: a port in TIME_WAIT after the last run counts as free.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
        except OSError:
            return False
    return True


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Number and code of the first child that fails; ``None`` once all have succeeded."""
    while True:
        codes = [child.poll() for child in children]
        for number, code in enumerate(codes):
            if code:
                return number, code
        if None not in codes:
            return None
        time.sleep(_POLL_S)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        child.terminate()
    deadline = time.monotonic() + _GRACE_S
    while any(child.poll() is None for child in alive) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for child in alive:
        child.kill()  # does nothing to a child that has ended
        child.wait()


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Inside, SIGTERM raises ``SystemExit``, so that children are ended on the way out; SIGINT does that by itself."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
