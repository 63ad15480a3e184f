"""A server as a process of ours: started with a bound, watched, ended as a whole.

What an engine (engine.py) and the router (router.py) have in common; each says its command line.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from rollout.process import LAUNCHER_PID, end_process_group

_PORT_TAKEN = "address already in use"
_MAX_PORTS = 3


class ServerError(RuntimeError):
    """The server did not start, or died; the message ends with the tail of its log."""


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def public_host(host: str) -> str:
    """The name under which other processes reach an interface."""
    return socket.gethostname() if host == "0.0.0.0" else host  # noqa: S104


def end_on_signals() -> None:
    """Exit with 0 on SIGTERM and SIGINT, once: a second one must not interrupt a server's end."""

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


class ServerProcess:
    """A running server. Use as a context manager, or call stop()."""

    ready_path = "/ready"
    """Answers 200 as soon as the server takes requests."""

    def __init__(self, *, name: str, host: str, start_timeout_s: float, log_path: Path) -> None:
        self.name = name
        self.host = host
        self.start_timeout_s = start_timeout_s
        self.log_path = log_path
        self.url = ""
        self.port = 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def command(self, port: int) -> list[str]:
        """The server's whole command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The server's environment variables: ours and what it needs."""
        return os.environ | {LAUNCHER_PID: str(os.getpid())}

    def is_ready(self, body: bytes) -> bool:
        """Whether this answer of ready_path (status 200) means that all is there."""
        return True

    def start(self) -> str:
        """Start the server, wait until it takes requests, return its URL.

        ServerError with the tail of the log when it dies or needs longer than start_timeout_s.
        """
        deadline = time.monotonic() + self.start_timeout_s
        for _ in range(_MAX_PORTS):
            port = free_port(self.host)
            self._spawn(port)
            try:
                self._wait_ready(deadline)
                return self.url
            except ServerError as error:
                self.stop()
                # Somebody took the port between our look and the server's bind.
                if _PORT_TAKEN not in str(error).lower():
                    raise
            except BaseException:
                self.stop()
                raise
        raise ServerError(f"{self.name}: {_MAX_PORTS} free ports in a row were taken by others")

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the server and every process it started; harmless when there is none."""
        if self.process is not None:
            end_process_group(self.process, timeout_s)
            self.process = None

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        assert self.process is not None
        return self.process.wait()

    def _spawn(self, port: int) -> None:
        self.port = port
        self.url = f"http://{public_host(self.host)}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # SGLang prints its arguments, the key among them: the log is its owner's alone.
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_start = os.fstat(descriptor).st_size
        try:
            self.process = subprocess.Popen(
                self.command(port),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def _wait_ready(self, deadline: float) -> None:
        assert self.process is not None
        while True:
            status = self.process.poll()
            if status is not None:
                raise ServerError(f"{self.name} ended with status {status}; {self.tail()}")
            if self._ready():
                return
            if time.monotonic() > deadline:
                limit = self.start_timeout_s
                raise ServerError(f"{self.name} took no requests within {limit:g} s; {self.tail()}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104
        connection = http.client.HTTPConnection(host, self.port, timeout=3)
        try:
            connection.request("GET", self.ready_path)
            reply = connection.getresponse()
            return reply.status == 200 and self.is_ready(reply.read()) and self._listens()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _listens(self) -> bool:
        """Whether it is our server that answers on the port, not one that took it meanwhile."""
        assert self.process is not None
        try:
            server = psutil.Process(self.process.pid)
            sockets = [
                connection
                for process in [server, *server.children(recursive=True)]
                for connection in process.net_connections("tcp")
            ]
        except psutil.NoSuchProcess:
            return False
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
            for connection in sockets
        )

    def tail(self, num_lines: int = 15) -> str:
        """The last lines this server logged."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()[-num_lines:]
        return f"the end of {self.log_path}:\n" + "\n".join(lines)
