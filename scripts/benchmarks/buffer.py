"""The data buffer at 10^3 to 10^5 groups: what a put and a take cost, and that neither grows.

    python scripts/benchmarks/buffer.py [--per-step 16] [--tokens 256] [--no-http]

In process, without tokens (the buffer never looks at them):

    at once   all groups start at version 0, finish in random order and are held together, then are
              taken step by step, per-step at a time
    rolling   nine versions alive, a ninth of the groups each; each step that is taken is one that
              is published, leased anew, and finished by whichever groups chance says

CPU is the thread's own time for a group; wall is of single calls: of one accept (put), of one take.
`dict` is the same number of entries put into and taken from a plain dictionary in the same random
order: what memory alone costs at this size. The last lines take the slowest calls apart: how many
a collection of garbage fell into, and how many the machine gave to another process meanwhile.

Over HTTP: `drivetrain-rollout` as it is, in a process of its own, whose groups are made up (one
sample of --tokens tokens) where engines would be asked. Puts are groups from lease to buffer; a
take is /batch, which journals the step to disk, and /samples, with the client's checks, at the
size that is held.

Seen on two idle cores: a put .81 us of CPU at 10^3, 1.55 at 10^5; a take 1.24 and 1.67 a group; a
plain dictionary .24 and .55, .15 and .64. p99 of a take of 16 groups 42 us; where it was 4 to 12
ms, a busy machine had given the core to another process (62 of the 63 slowest of 6,250 calls;
garbage: none of them). Over HTTP 4,400 to 4,900 puts and 150 to 190 takes a second, p99 of /batch 4
to 7 ms, of /samples 3 ms, at 10^3 to 10^5 groups held.

Exit status 1 when a put or a take of 10^5 groups costs more than three times the CPU of 10^3 (one
linear in them: a hundred times; a plain dictionary takes two to three), or when groups are lost,
doubled or out of order.
"""

import argparse
import gc
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmarks")]

# pyright: reportMissingImports=false
from buffer_http import HEADER, check, over_http  # noqa: E402

from rollout.buffer import DataBuffer  # noqa: E402
from rollout.buffer_state import Lease  # noqa: E402
from rollout.types import Group  # noqa: E402

SIZES = (1_000, 10_000, 100_000)
GROWTH_MAX = 3.0
VERSIONS = 9


class Timer:
    """Wall time of single calls, CPU time of all of them together."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu_s = 0.0

    def calls(self, call: Callable, arguments: list) -> list:
        """Results of a call of each; the garbage collector is off."""
        results, wall = [], self.wall
        gc.disable()
        start_cpu = time.thread_time()
        for each in arguments:
            start = time.perf_counter()
            results.append(call(each))
            wall.append(time.perf_counter() - start)
        self.cpu_s += time.thread_time() - start_cpu
        gc.enable()
        return results

    def percentile(self, percent: float) -> float:
        """Of the wall times, microseconds."""
        return float(np.percentile(self.wall, percent)) * 1e6


def leases(buffer: DataBuffer) -> list[Lease]:
    """All that the buffer gives."""
    found = []
    while lease := buffer.lease():
        found.append(lease)
    return found


def groups(of: list[Lease]) -> list[Group]:
    """What comes of them."""
    return [Group(group_id=x.group_id, start_version=x.start_version, samples=[]) for x in of]


def at_once(size: int, per_step: int) -> tuple[Timer, Timer]:
    """Puts and takes of groups that are held together."""
    steps = size // per_step
    buffer = DataBuffer(groups_per_step=per_step, max_staleness_steps=steps - 1, num_steps=steps)
    buffer.publish(0)
    started = leases(buffer)
    random.Random(0).shuffle(started)
    puts, takes = Timer(), Timer()
    puts.calls(buffer.accept, groups(started))
    taken = takes.calls(lambda step: buffer.take() or [], list(range(steps)))
    check([group.group_id for batch in taken for group in batch], size // per_step * per_step)
    return puts, takes


def rolling(size: int) -> tuple[Timer, Timer]:
    """The same with versions that come and go; a step is a ninth of the groups."""
    per_step = size // VERSIONS
    buffer = DataBuffer(groups_per_step=per_step, max_staleness_steps=VERSIONS - 1)
    order, running, taken = random.Random(0), [], []
    puts, takes = Timer(), Timer()
    for version in range(3 * VERSIONS):
        buffer.publish(version)
        running += leases(buffer)
        order.shuffle(running)
        while not buffer.may_take():
            count = max(1, per_step // 4)
            puts.calls(buffer.accept, groups(running[:count]))
            del running[:count]
        (batch,) = takes.calls(lambda step: buffer.take() or [], [version])
        if any(version - group.start_version >= VERSIONS for group in batch):
            sys.exit("a group was trained after its bound")
        taken += [group.group_id for group in batch]
    taken += [group.group_id for group in buffer.state_dict().accepted]
    taken += [lease.group_id for lease in running]
    check(sorted(taken), (4 * VERSIONS - 1) * per_step)
    return puts, takes


def dictionary(size: int) -> tuple[float, float]:
    """Microseconds of CPU that a put and a take of a plain dictionary cost at this size."""
    order = groups([Lease(group_id=k, start_version=0) for k in range(size)])
    random.Random(0).shuffle(order)
    ids = [group.group_id for group in order]
    random.Random(1).shuffle(ids)
    there: dict[int, Group] = {}
    puts, takes = Timer(), Timer()
    puts.calls(lambda group: there.__setitem__(group.group_id, group), order)
    takes.calls(there.pop, ids)
    return puts.cpu_s / size * 1e6, takes.cpu_s / size * 1e6


def in_process(per_step: int) -> dict[str, list[float]]:
    """Print the table; CPU a group in microseconds by row and column, for each size."""
    print(f"{'':8} {'groups':>8} {'put CPU':>8} {'p50':>7} {'p99':>7} {'max':>8}", end="")
    print(f" {'take CPU':>9} {'a step p50':>10} {'p99':>9} {'max':>9}   us; CPU of a group")
    seen: dict[str, list[float]] = {}
    for size in SIZES:
        for name, measure in (("at once", lambda n: at_once(n, per_step)), ("rolling", rolling)):
            puts, takes = measure(size)
            step = per_step if name == "at once" else size // VERSIONS
            costs = [
                puts.cpu_s / len(puts.wall) * 1e6,
                takes.cpu_s / len(takes.wall) / step * 1e6,
            ]
            print(
                f"{name:8} {size:8d} {costs[0]:8.2f} {puts.percentile(50):7.2f} "
                f"{puts.percentile(99):7.2f} {puts.percentile(100):8.1f} {costs[1]:9.2f} "
                f"{takes.percentile(50):10.1f} {takes.percentile(99):9.1f} "
                f"{takes.percentile(100):9.1f}"
            )
            for column, cost in zip(("put", "take"), costs, strict=True):
                seen.setdefault(f"{name}: {column}", []).append(cost)
        put, take = dictionary(size)
        print(f"{'dict':8} {size:8d} {put:8.2f} {'':24} {take:9.2f}")
    return seen


def slowest(size: int, per_step: int) -> None:
    """Where the slowest hundredth of the takes come from, the collector being on as in a run."""
    steps = size // per_step
    buffer = DataBuffer(groups_per_step=per_step, max_staleness_steps=steps - 1, num_steps=steps)
    buffer.publish(0)
    for group in groups(leases(buffer)):
        buffer.accept(group)
    collections: list[int] = []
    gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
    rows = []
    for _ in range(steps):
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        seen, cpu, start = len(collections), time.thread_time(), time.perf_counter()
        buffer.take()
        wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
        switched = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw - switches
        rows.append((wall, cpu, len(collections) > seen, switched > 0))
    gc.callbacks.pop()
    wall, cpu = (np.array([row[k] for row in rows]) * 1e6 for k in (0, 1))
    slow = [row for row in rows if row[0] * 1e6 >= np.percentile(wall, 99)]
    print(
        f"{size} groups, {steps} takes of {per_step}: p99 {np.percentile(wall, 99):.0f} us by the "
        f"clock, {np.percentile(cpu, 99):.0f} us of CPU; of the {len(slow)} slowest "
        f"{sum(row[3] for row in slow)} were interrupted for another process, "
        f"{sum(row[2] for row in slow)} collected garbage"
    )


def main() -> None:
    """Print the tables; exit 1 when the contract is broken."""
    parser = argparse.ArgumentParser(description="what a put and a take cost, by size")
    parser.add_argument("--per-step", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a response, over HTTP")
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    seen = in_process(arguments.per_step)
    slowest(SIZES[-1], arguments.per_step)
    growth = {name: costs[-1] / costs[0] for name, costs in seen.items()}
    print("10^5 over 10^3, CPU: " + ", ".join(f"{k} {v:.2f}" for k, v in growth.items()))
    if arguments.http:
        print(HEADER)
        for size in SIZES:
            over_http(size, arguments.per_step, arguments.tokens)
        for tokens in (1024, 4096):
            over_http(SIZES[0], arguments.per_step, tokens, per_prompt=8)
    if max(growth.values()) > GROWTH_MAX:
        sys.exit(f"a call grows with the buffer: more than {GROWTH_MAX} times")


if __name__ == "__main__":
    main()
