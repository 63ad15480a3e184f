"""The supervisor with small scripts as roles: whatever ends a run ends all of it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from framework.launch.restarts import Restarts
from framework.launch.role_log import failure_reason
from framework.launch.roles import Restart, Role
from framework.launch.supervisor import InterruptedRunError, RoleFailedError, Supervisor

TIMEOUT_S = 20.0
ENDLESS = "import time\nopen('ready', 'w').close()\nwhile True: time.sleep(1)"
DEAF = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "open('ready', 'w').close()\nwhile True: time.sleep(1)"
)
# Like torchrun: a child in a session of its own, which its parent's death does not end.
FAMILY = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    " start_new_session=True)\n"
    "open('child', 'w').write(str(child.pid))\n"
)

MakeRole = Callable[..., Role]


@pytest.fixture
def make_role(tmp_path: Path) -> MakeRole:
    """A role that runs a piece of Python in a directory of its own."""

    def make(
        name: str, code: str, *, may_end: bool = False, restart: Restart = Restart.NEVER
    ) -> Role:
        home = tmp_path / name
        home.mkdir()
        code = f"import os; os.chdir({str(home)!r})\n{code}"
        return Role(
            name=name,
            command=[sys.executable, "-S", "-c", code],
            log=tmp_path / f"{name}.log",
            may_end=may_end,
            restart=restart,
            address=tmp_path / f"{name}.json",
        )

    return make


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a child process behind."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    for process in left:
        process.kill()
    assert not left


def supervise(
    roles: list[Role],
    awaited: str,
    tick: Callable[[], None] = lambda: None,
    stop_timeout_s: float = 5.0,
    restarts: Restarts | None = None,
) -> None:
    with Supervisor(stop_timeout_s, restarts) as supervisor:
        for role in roles:
            supervisor.start(role)
        supervisor.wait(awaited, tick)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_awaited_role_ends_and_the_others_are_stopped(make_role: MakeRole, tmp_path: Path) -> None:
    ticks: list[int] = []
    with Supervisor(5.0) as supervisor:
        supervisor.start(make_role("engine_0", ENDLESS))
        wait_for(tmp_path / "engine_0" / "ready")
        supervisor.start(make_role("rollout", "pass", may_end=True))
        supervisor.start(make_role("trainer", "import time; time.sleep(0.5)"))
        supervisor.wait("trainer", lambda: ticks.append(1))
    assert ticks


def test_death_of_another_role_names_it_its_code_and_its_reason(make_role: MakeRole) -> None:
    code = "import sys\nprint('drivetrain-rollout: no prompts left')\nsys.exit(3)"
    roles = [make_role("trainer", ENDLESS), make_role("rollout", code, may_end=True)]
    wanted = r"rollout ended with exit code 3 .*: no prompts left; see .*log"
    with pytest.raises(RoleFailedError, match=wanted) as raised:
        supervise(roles, "trainer")
    assert raised.value.tail == ["drivetrain-rollout: no prompts left"]


def test_engine_that_ends_by_itself_fails_the_run_even_with_status_0(make_role: MakeRole) -> None:
    roles = [make_role("engine_0", "pass"), make_role("trainer", ENDLESS)]
    with pytest.raises(RoleFailedError, match="engine_0 ended with exit code 0"):
        supervise(roles, "trainer")


LIVES = """
import os, pathlib, signal, sys, time
lives = pathlib.Path("lives")
lives.write_text((lives.read_text() if lives.exists() else "") + os.environ["DRIVETRAIN_RESTARTS"])
if len(lives.read_text()) == {lives}:
    while True: time.sleep(1)
pathlib.Path("../engine_0.json").write_text("here")
time.sleep(0.5)
print("drivetrain-engine: life", len(lives.read_text()), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)"])
def test_a_lost_engine_is_started_again_and_its_old_address_is_gone(
    make_role: MakeRole, tmp_path: Path, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lives, address = tmp_path / "engine_0" / "lives", tmp_path / "engine_0.json"
    with Supervisor(1.0, Restarts(2, 60.0)) as supervisor:
        supervisor.start(
            make_role("engine_0", LIVES.format(lives=3, end=end), restart=Restart.LOST)
        )
        until = f"import time, os\nwhile not os.path.exists({str(lives)!r}) or "
        until += f"open({str(lives)!r}).read() != '012': time.sleep(0.05)"
        supervisor.start(make_role("trainer", until))
        supervisor.wait("trainer")
    assert not address.exists()
    assert capfd.readouterr().err.count("started again") == 2


def test_a_role_that_dies_too_often_ends_the_run_with_its_last_words(make_role: MakeRole) -> None:
    code = LIVES.format(lives=9, end="sys.exit(1)")
    roles = [make_role("engine_0", code, restart=Restart.LOST), make_role("trainer", ENDLESS)]
    with pytest.raises(RoleFailedError, match=r"exit code 1 .*: life 3; see") as raised:
        supervise(roles, "trainer", restarts=Restarts(2, 60.0))
    assert raised.value.tail == ["drivetrain-engine: life 3"]


@pytest.mark.parametrize(
    ("restart", "code"),
    [
        (Restart.LOST, "import sys; sys.exit(1)"),  # it never was at work: it would not be again
        (
            Restart.KILLED,
            "import sys, time; open('../rollout.json', 'w'); time.sleep(0.5); exit(1)",
        ),
    ],
)
def test_what_would_recur_is_not_tried_again(
    make_role: MakeRole, restart: Restart, code: str
) -> None:
    roles = [make_role("rollout", code, restart=restart), make_role("trainer", ENDLESS)]
    with pytest.raises(RoleFailedError, match="rollout ended with exit code 1"):
        supervise(roles, "trainer", restarts=Restarts(9, 60.0))


def test_deaths_long_ago_are_forgotten(make_role: MakeRole, monkeypatch) -> None:
    now, role = [0.0], make_role("engine_0", "", restart=Restart.LOST)
    monkeypatch.setattr("framework.launch.restarts.time.monotonic", lambda: now[0])
    restarts = Restarts(1, 60.0)
    assert restarts.after(role, -9, True) == 1
    now[0] = 61.0
    assert restarts.after(role, -9, True) == 2
    now[0] = 100.0
    assert restarts.after(role, -9, True) == 0


def test_death_by_signal_is_named(make_role: MakeRole) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RoleFailedError, match="trainer ended with signal SIGKILL"):
        supervise([make_role("trainer", code)], "trainer")


def test_role_that_ignores_sigterm_is_killed_in_bounded_time(
    make_role: MakeRole, tmp_path: Path
) -> None:
    start = time.monotonic()
    with Supervisor(1.0) as supervisor:
        supervisor.start(make_role("engine_0", DEAF))
        wait_for(tmp_path / "engine_0" / "ready")
        supervisor.start(make_role("trainer", "pass"))
        supervisor.wait("trainer")
        start = time.monotonic()
    assert 1.0 <= time.monotonic() - start < 6.0


def test_grandchild_in_its_own_session_ends_though_its_parent_was_killed(
    make_role: MakeRole, tmp_path: Path
) -> None:
    code = FAMILY + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RoleFailedError, match="SIGKILL"):
        supervise([make_role("trainer", code)], "trainer", stop_timeout_s=1.0)
    assert gone(int((tmp_path / "trainer" / "child").read_text()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_everything(make_role: MakeRole, signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    roles = [make_role("trainer", ENDLESS)]
    with pytest.raises(InterruptedRunError) as raised:
        supervise(roles, "trainer", lambda: os.kill(os.getpid(), signum))
    assert raised.value.signum == signum
    assert signal.getsignal(signum) is before


def test_second_ctrl_c_does_not_wait_for_a_deaf_role(make_role: MakeRole, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_for(tmp_path / "trainer" / "ready")
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    start = time.monotonic()
    with pytest.raises(InterruptedRunError):
        supervise([make_role("trainer", DEAF)], "trainer", interrupt, stop_timeout_s=60.0)
    assert time.monotonic() - start < 20.0


def test_program_that_is_missing_is_a_failure_with_its_name(tmp_path: Path) -> None:
    role = Role(name="trainer", command=["/no/such/torchrun"], log=tmp_path / "trainer.log")
    with pytest.raises(RoleFailedError, match=r"trainer cannot be started: .*/no/such/torchrun"):
        supervise([role], "trainer")


def test_logs_are_readable_by_their_owner_only(make_role: MakeRole) -> None:
    role = make_role("trainer", "print('secret')")
    supervise([role], "trainer")
    assert role.log.read_text() == "secret\n"
    assert role.log.stat().st_mode & 0o077 == 0


def test_own_subprocesses_of_the_caller_are_left_alone(make_role: MakeRole) -> None:
    mine = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        supervise([make_role("trainer", "pass")], "trainer")
        assert mine.poll() is None
    finally:
        mine.kill()
        mine.wait(timeout=TIMEOUT_S)


def test_kill_9_of_the_launcher_ends_its_roles(tmp_path: Path) -> None:
    launcher = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from framework.launch.roles import Role
        from framework.launch.supervisor import Supervisor
        home = Path({str(tmp_path)!r})
        code = "import os, time; open({str(tmp_path)!r} + '/pid', 'w').write(str(os.getpid()))"
        code += "; time.sleep(600)"
        with Supervisor(1.0) as supervisor:
            role = Role(name="t", command=[sys.executable, "-S", "-c", code], log=home / "t.log")
            supervisor.start(role)
            supervisor.wait("t")
        """
    )
    process = subprocess.Popen([sys.executable, "-c", launcher])
    try:
        wait_for(tmp_path / "pid")
        time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text())
        assert psutil.pid_exists(pid)
    finally:
        process.kill()
        process.wait(timeout=TIMEOUT_S)
    assert gone(pid)


def test_reason_is_the_cause_not_what_it_did_to_other_ranks() -> None:
    log = [
        "[rank1]: Traceback (most recent call last):",
        "[rank1]: RuntimeError: [gloo/transport/tcp] Connection closed by peer [127.0.0.1]:4242",
        "[rank0]: ValueError: num_steps=4: too few",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    ]
    assert failure_reason(log) == "[rank0]: ValueError: num_steps=4: too few"
    assert failure_reason([*log, "trainer: GateError: step 0: differ"]).startswith("trainer: GateE")
    killed = [*log[-1:], "Root Cause (first observed failure):", "[0]:", "  rank      : 1 (local)"]
    killed += ["  exitcode  : -9 (pid: 7)", "  traceback : Signal 9 (SIGKILL) received by PID 7"]
    assert failure_reason(killed) == "rank 1 (local) ended first, with exit code -9 (pid: 7)"
    assert failure_reason(["all is well", "INFO: 200 OK"]) == ""
