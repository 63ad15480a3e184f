"""Where the time and the memory of a step go: its phases always, a trace where one is asked for."""

import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from framework.config_system import ProfileConfig


class Phases:
    """Seconds of the named parts of a step on this rank; each is a range of the trace as well."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """What runs inside counts as `name`, kernels that it launched included."""
        start = time.perf_counter()
        with record_function(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """perf/<name>_s of the phases since the last call, and the memory at its peak."""
        figures = {f"perf/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return {**figures, "perf/peak_memory_bytes": float(peak_memory_bytes())}


def peak_memory_bytes() -> int:
    """Peak of GPU tensors since the last call; without a GPU, of this process since its start."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


class StepProfiler:
    """Traces the steps that `profile` names, on the ranks that it names.

    Writes <directory>/rank_<rank>.json.gz and, with memory_snapshot, rank_<rank>_memory.pickle.
    """

    def __init__(self, config: ProfileConfig, directory: Path, rank: int) -> None:
        self._first = config.first_step if rank in config.ranks else 0
        self._last = config.first_step + config.num_steps - 1
        self._snapshot = config.memory_snapshot and torch.cuda.is_available()
        self._path = directory / f"rank_{rank}"
        self._profile: Any = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Step `number`, counted from 1, runs inside."""
        if self._first and self._profile is None and self._first <= number <= self._last:
            self._begin()
        yield
        if self._profile is not None and number >= self._last:
            self.finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if self._snapshot:
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def finish(self) -> None:
        """Write what is being traced: also where the run ends before the last step of it."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(f"{self._path}.json.gz")
        if self._snapshot:
            torch.cuda.memory._dump_snapshot(f"{self._path}_memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
