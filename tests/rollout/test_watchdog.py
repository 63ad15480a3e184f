"""What a wait that takes long leaves in the log."""

import signal
import subprocess
import sys
import textwrap
import time

from rollout.watchdog import Watchdog


def test_a_long_wait_tells_what_is_missing_and_where_it_hangs(capfd):
    watchdog = Watchdog("trainer rank 3", 0.2)

    def the_collective_that_hangs() -> None:
        time.sleep(0.7)

    with watchdog.watch("the batch of step 7", lambda: "groups [4] are running"):
        the_collective_that_hangs()
    time.sleep(0.3)
    said = capfd.readouterr().err
    told = [line for line in said.splitlines() if line.startswith("watchdog: ")]
    assert 2 <= len(told) <= 3, "it goes on telling while it waits, and not afterwards"
    assert (
        "trainer rank 3 has waited 0 s for the batch of step 7: groups [4] are running" in told[0]
    )
    assert "the_collective_that_hangs" in said


def test_a_short_wait_tells_nothing(capfd):
    for after_s in (0.0, 30.0):
        with Watchdog("rank 0", after_s).watch("a push"):
            pass
    assert capfd.readouterr().err == ""


def test_a_signal_asks_for_the_stacks_and_ends_nothing():
    code = textwrap.dedent(
        """
        import time
        from rollout.watchdog import dump_stacks_on_signal
        def where_it_waits():
            print("ready", flush=True)
            time.sleep(1.5)
        dump_stacks_on_signal()
        where_it_waits()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "where_it_waits" in stderr
