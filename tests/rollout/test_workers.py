"""Computation in processes that are killed when they take too long; math-verify in them."""

import asyncio
import os
import sys
import time
from dataclasses import replace

import psutil
import pytest

from rollout.bounds import Bound
from rollout.rewards import REWARDS, Task
from rollout.rewards.workers import WorkerError, Workers
from rollout.types import Status
from tests.rollout.test_wire import make_sample

CHILD = """
import json, os, signal, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    given = json.loads(line)
    if given["do"] == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
        while True:
            time.sleep(1)
    if given["do"] == "rest":
        time.sleep(0.2)
    if given["do"] == "die":
        os._exit(7)
    if given["do"] == "garble":
        print("no reply", flush=True)
        continue
    answer = {"error": "KeyError: no such"} if given["do"] == "raise" else {"result": os.getpid()}
    print(json.dumps(answer), flush=True)
"""


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_what_hangs_is_killed_and_replaced_and_others_go_on():
    workers = Workers([sys.executable, "-c", CHILD], timeout_s=1.0)

    async def run() -> None:
        first = await workers.ask({"do": "tell"})
        assert await workers.ask({"do": "tell"}) == first, "a process serves many requests"
        hanging = [asyncio.create_task(workers.ask({"do": "hang"})) for _ in range(8)]
        start = time.monotonic()
        ticks = 0
        while not all(each.done() for each in hanging):
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 20, "the event loop went on"
        assert time.monotonic() - start < 60
        for each in hanging:
            with pytest.raises(WorkerError, match=r"^no result within 1 s$"):
                await each
        assert await workers.ask({"do": "tell"}) != first
        for do, said in (
            ("die", r"the process that computes it died \(status 7\)"),
            ("raise", "^KeyError: no such$"),
            ("garble", "the process that computes it says b'no reply"),
        ):
            with pytest.raises(WorkerError, match=said):
                await workers.ask({"do": do})
        given_up = asyncio.create_task(workers.ask({"do": "hang"}))
        await asyncio.sleep(0.2)
        given_up.cancel()
        last = await workers.ask({"do": "tell"})
        assert last in children()

    before = children()
    asyncio.run(run())
    left = [psutil.Process(pid) for pid in children() - before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, "they end with their event loop"


def test_a_wait_for_a_free_worker_is_nobodys_time_and_a_dead_one_costs_nobody(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    workers = Workers([sys.executable, "-c", CHILD], timeout_s=60.0)

    async def ask(do: str, limit_s: float) -> int:
        async with Bound(limit_s):
            return await workers.ask({"do": do})

    async def run() -> None:
        pids = await asyncio.gather(*(ask("rest", 1.0) for _ in range(8)))
        assert len(set(pids)) == 1, "one after the other, in 1.6 s"
        with pytest.raises(TimeoutError):
            await ask("hang", 0.3)
        first = await ask("tell", 60.0)
        psutil.Process(first).kill()
        await asyncio.to_thread(psutil.Process(first).wait, 10)
        await asyncio.sleep(0.05)  # the event loop has seen it end, too
        assert await ask("tell", 60.0) != first

    asyncio.run(run())


def test_a_process_that_never_is_ready_is_told():
    workers = Workers(["sleep", "60"], timeout_s=1.0, start_timeout_s=0.2)
    with pytest.raises(WorkerError, match=r"no result within 0\.2 s"):
        asyncio.run(workers.ask({}))
    with pytest.raises(WorkerError, match=r"died \(status 1\)"):
        asyncio.run(Workers(["false"], timeout_s=1.0).ask({}))


def test_mathematics_does_not_hold_up_the_event_loop():
    """A reply that math-verify takes seconds over, beside one that it does not."""

    async def score(reply: str) -> float:
        description = {"prompt": "", "answer": "\\frac{1}{2}"}
        sample = replace(make_sample(), status=Status.STOPPED)
        task = Task(description=description, replies=[reply], environment_reward=0.0)
        return (await REWARDS["math"](sample, task)).value

    async def run() -> None:
        assert await score("so it is \\boxed{0.5}") == 1.0
        slow = asyncio.create_task(score("\\boxed{9^{9^{9^9}}}"))
        longest, last = 0.0, time.monotonic()
        while not slow.done():
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert await slow == 0.0
        assert longest < 2.0, "math-verify alone computes for three seconds"
        assert await score("\\boxed{3}") == 0.0

    asyncio.run(run())
