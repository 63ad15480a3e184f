"""Starts processes, watches them, and ends every one of them, whatever happens.

Each role leads a session of its own. torchrun's workers and SGLang's children open further
sessions; the launcher makes itself their *subreaper*, so that a process whose parent died becomes
its child and is found. A launcher that is killed outright takes its roles with it: the kernel
sends them SIGKILL when their parent ends, and they ask the same for their own children.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

from framework.launch.restarts import Restarts
from framework.launch.role_log import STARTS, failure_reason, log_tail
from framework.launch.roles import Role
from rollout.process import LAUNCHER_PID, RESTARTS

POLL_S = 0.1
KILL_TIMEOUT_S = 10.0
RESTART_DELAY_S = 0.5
"""For what the dead one held: its children end a moment after it."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class RoleFailedError(RuntimeError):
    """A role ended that should not have; `tail` holds the last lines of its log."""

    def __init__(self, message: str, tail: list[str]) -> None:
        super().__init__(message)
        self.tail = tail


class InterruptedRunError(RuntimeError):
    """Somebody asked the run to end (Ctrl-C, SIGTERM, hang-up)."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum


class UnstoppableError(RuntimeError):
    """A process outlived SIGKILL: the kernel holds it."""


class Supervisor:
    """The living roles of a run. Use as a context manager: leaving it stops everything."""

    def __init__(self, stop_timeout_s: float, restarts: Restarts | None = None) -> None:
        """restarts: None: whatever dies ends the run."""
        self._stop_timeout_s = stop_timeout_s
        self._restarts = restarts or Restarts(0, 0.0)
        self._ready: set[str] = set()
        self._running: dict[str, tuple[Role, subprocess.Popen[bytes], float]] = {}
        self._signals: list[int] = []
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._exit_stack = contextlib.ExitStack()
        self._foreign: set[psutil.Process] = set()

    def __enter__(self) -> "Supervisor":
        self._foreign = set(psutil.Process().children())
        self._exit_stack.enter_context(self._catch_signals())
        self._exit_stack.enter_context(self._adopt_orphans())
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._exit_stack:
            self.stop()

    def start(self, role: Role, again: int = 0) -> None:
        """Start a role; call it from the main thread (its parent, to the kernel, is a thread).

        Args:
            again: how often it has been started before.

        Raises:
            RoleFailedError: its program cannot be started.
        """
        role.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **role.env, LAUNCHER_PID: str(os.getpid())}
        env[RESTARTS] = str(again)
        # Owner only: SGLang prints its arguments, and the run's token is one of them.
        descriptor = os.open(role.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab", buffering=0) as log:
            if again:
                log.write(f"{STARTS}{again + 1} of {role.name}\n".encode())
            try:
                process = subprocess.Popen(
                    role.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                    preexec_fn=self._end_with_launcher,
                )
            except OSError as error:
                raise RoleFailedError(f"{role.name} cannot be started: {error}", []) from error
        self._running[role.name] = (role, process, time.monotonic())

    def wait(self, name: str, tick: Callable[[], None] = lambda: None) -> None:
        """Return when role `name` has ended with status 0; `tick` is called while it works.

        Raises:
            RoleFailedError: a role ended that should not have, and is not started again.
            InterruptedRunError: a signal asked the run to end.
        """
        while True:
            if self._signals:
                raise InterruptedRunError(self._signals[0])
            _, awaited, _ = self._running[name]
            if awaited.poll() == 0:
                del self._running[name]
                return
            for role, process, started in list(self._running.values()):
                code = process.poll()
                if code is None:
                    if role.address is not None and role.address.exists():
                        self._ready.add(role.name)
                elif code or not role.may_end:
                    self._start_again(role, code, time.monotonic() - started)
            tick()
            time.sleep(POLL_S)

    def _start_again(self, role: Role, code: int, lived_s: float) -> None:
        """A role has ended; RoleFailedError where that is the end of the run."""
        again = self._restarts.after(role, code, role.name in self._ready)
        failure = _failure(role, code, lived_s)
        if not again:
            raise failure
        print(
            f"drivetrain: {failure}; started again (number {again}, "
            f"cluster.max_restarts={self._restarts.max_restarts})",
            file=sys.stderr,
            flush=True,
        )
        if role.address is not None:  # of the dead one: nobody listens there
            role.address.unlink(missing_ok=True)
        time.sleep(RESTART_DELAY_S)
        self.start(role, again)

    def stop(self) -> None:
        """End every role and whatever it started: SIGTERM, after stop_timeout_s SIGKILL.

        Raises:
            UnstoppableError: a process survived SIGKILL.
        """
        asked = len(self._signals)
        for _, process, _ in self._running.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_timeout_s
        # A second Ctrl-C does not wait for the roles' own clean end.
        while self._alive() and time.monotonic() < deadline and len(self._signals) == asked:
            time.sleep(POLL_S / 2)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while (alive := self._alive()) and time.monotonic() < deadline:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(POLL_S / 2)
        self._running.clear()
        if alive:
            pids = ", ".join(str(process.pid) for process in alive)
            raise UnstoppableError(f"processes {pids} survived SIGKILL for {KILL_TIMEOUT_S:g} s")

    def _alive(self) -> list[psutil.Process]:
        """Roles, their descendants, and orphans of theirs that the launcher inherited."""
        for _, process, _ in self._running.values():
            process.poll()
        role_pids = {process.pid for _, process, _ in self._running.values()}
        own_session = os.getsid(0)
        alive: list[psutil.Process] = []
        for child in psutil.Process().children():
            if child in self._foreign:
                continue
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if child.pid not in role_pids and os.getsid(child.pid) == own_session:
                    continue  # started by the launcher itself for something else
                if child.status() == psutil.STATUS_ZOMBIE:
                    if child.pid not in role_pids:
                        os.waitpid(child.pid, os.WNOHANG)
                    continue
                alive += [child, *child.children(recursive=True)]
        return alive

    def _end_with_launcher(self) -> None:
        """Runs in the child between fork and exec: the kernel kills it when the launcher ends."""
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    @contextlib.contextmanager
    def _adopt_orphans(self) -> Iterator[None]:
        if self._libc is None:
            yield
            return
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            yield
        finally:
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP are noted; `wait` acts on them. nohup stays nohup."""

        def note(signum: int, _: FrameType | None) -> None:
            self._signals.append(signum)

        previous = {}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, note)
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _failure(role: Role, code: int, lived_s: float) -> RoleFailedError:
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    tail = log_tail(role)
    reason = failure_reason(tail)
    message = f"{role.name} ended with {how} after {lived_s:.0f} s"
    if reason:
        message += f": {reason}"
    return RoleFailedError(f"{message}; see {role.log}", tail)
