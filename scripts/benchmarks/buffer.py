"""The data buffer at 10^3 to 10^5 groups: what a put and a take cost, and that neither grows.

    python scripts/benchmarks/buffer.py [--per-step 16]

All groups are started at version 0, finished in random order and held at once, then taken step by
step. In process, without tokens: the buffer never looks
at them, and what HTTP adds is the same at every size.

    put     one lease and one accept
    take    one batch of per-step groups
    p99     of single calls, microseconds

Exit status 1 when the median put or take of 10^5 groups costs more than ten times what it does of
10^3 (one linear in them would be a hundred times; caches and the heap's log n take their share),
or when groups are lost, doubled or out of order.
"""

import argparse
import gc
import random
import sys
import time

import numpy as np

from rollout.buffer import DataBuffer
from rollout.types import Group

SIZES = (1_000, 10_000, 100_000)
GROWTH_MAX = 10.0


def main() -> None:
    """Print the table; exit 1 when the contract is broken."""
    parser = argparse.ArgumentParser(description="what a put and a take cost, by size")
    parser.add_argument("--per-step", type=int, default=16)
    per_step = parser.parse_args().per_step
    medians = {}
    print(f"{'groups':>8} {'puts/s':>10} {'put p50':>9} {'p99 us':>8} {'takes/s':>9} {'p99 us':>8}")
    for size in SIZES:
        puts, takes = measure(size // per_step * per_step, per_step)
        medians[size] = np.median(puts), np.median(takes)
        print(
            f"{size:8d} {1 / puts.mean():10.0f} {np.median(puts) * 1e6:9.2f} "
            f"{np.percentile(puts, 99) * 1e6:8.2f} {1 / takes.mean():9.0f} "
            f"{np.percentile(takes, 99) * 1e6:8.2f}"
        )
    growth = [
        last / first
        for first, last in zip(*(medians[size] for size in (SIZES[0], SIZES[-1])), strict=True)
    ]
    print(f"10^5 over 10^3, medians: put {growth[0]:.2f}, take {growth[1]:.2f}")
    if max(growth) > GROWTH_MAX:
        sys.exit(f"a call grows with the buffer: more than {GROWTH_MAX} times")


def measure(size: int, per_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each put [size] and of each take [size / per_step]; checks what comes out."""
    steps = size // per_step
    buffer = DataBuffer(groups_per_step=per_step, max_staleness_steps=steps - 1, num_steps=steps)
    buffer.publish(0)
    order = random.Random(0)
    puts, takes, seen = [], [], []
    leases, start = [], time.perf_counter()
    while lease := buffer.lease():
        leases.append(lease)
    lease_s = (time.perf_counter() - start) / size
    order.shuffle(leases)
    gc.disable()  # its pauses are the interpreter's, and grow with everything that lives
    for lease in leases:
        group = Group(group_id=lease.group_id, start_version=lease.start_version, samples=[])
        start = time.perf_counter()
        buffer.accept(group)
        puts.append(time.perf_counter() - start + lease_s)
    for _ in range(steps):
        start = time.perf_counter()
        batch = buffer.take()
        takes.append(time.perf_counter() - start)
        if batch is None:
            sys.exit(f"no batch at step {buffer.next_step} though all groups are there")
        seen += [group.group_id for group in batch]
    gc.enable()
    if seen != list(range(size)):
        sys.exit("groups were lost, doubled, or came out of order")
    return np.array(puts), np.array(takes)


if __name__ == "__main__":
    main()
