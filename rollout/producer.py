"""Keeps the engines busy within the staleness bound and makes batches of what comes back.

No polling: a published version starts groups, a finished group wakes the steps that wait.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from rollout.batch import make_batch
from rollout.buffer import BufferState, DataBuffer, Lease
from rollout.client import EngineFailure
from rollout.data import PromptStream
from rollout.filters import FilterFailure, GroupFilters, keep_widest
from rollout.generate import Episode, Generator
from rollout.journal import drop_steps, read_step, step_path, write_step
from rollout.seeds import derive_seed
from rollout.types import Group, Sample, Status, StepBatch

logger = logging.getLogger(__name__)

_STEPS_IN_MEMORY = 2
_STATE_FORMAT = 1


class ProducerFailure(RuntimeError):
    """Generation ended for good; the message is the reason."""


@dataclass(kw_only=True, slots=True)
class ProducerState:
    """What generation needs to go on from a step: part of a checkpoint."""

    format: int
    buffer: BufferState
    prompts: dict[str, int]
    """The prompt stream's cursor."""


class Producer:
    """Prompts -> groups -> buffer -> journaled batches."""

    def __init__(
        self,
        *,
        buffer: DataBuffer,
        prompts: PromptStream,
        generator: Generator,
        samples_per_prompt: int,
        seed: int,
        rollouts: Path,
        max_running_groups: int,
        filters: GroupFilters | None = None,
        max_dropped_per_step: int = 0,
        keep_share: float = 1.0,
    ) -> None:
        """max_dropped_per_step: groups that filters may drop for one step before the run ends."""
        self.buffer = buffer
        self.failure: str | None = None
        """Why generation ended for good."""
        self.failed = asyncio.Event()
        self._prompts = prompts
        self._generator = generator
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._rollouts = rollouts
        self._max_running_groups = max_running_groups
        self._filters = filters or GroupFilters([])
        self._max_dropped_per_step = max_dropped_per_step
        self._keep_share = keep_share
        self._changed = asyncio.Condition()
        self._delivery = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()
        self._times: dict[int, tuple[float, float]] = {}
        self._delivered: dict[int, tuple[StepBatch, list[Sample]]] = {}

    def publish(self, version: int) -> None:
        """The engines have this version: start every group that it allows."""
        self.buffer.publish(version)
        self._admit()

    async def batch(self, step: int, wait_s: float) -> tuple[StepBatch, list[Sample]] | None:
        """The batch of a step, the same whenever it is asked for; None when wait_s ran out.

        Raises ProducerFailure when it cannot come any more, ValueError for a step out of turn.
        """
        if step > self.buffer.next_step:
            raise ValueError(f"step {step} was asked for before step {self.buffer.next_step}")
        try:
            async with asyncio.timeout(wait_s):
                await self._wait_for(step)
        except TimeoutError:
            return None
        return await self._deliver(step)

    def state_dict(self, step: int) -> ProducerState:
        """Everything, between the delivery of step - 1 and that of `step`; ValueError elsewhere."""
        if self.buffer.next_step != step:
            raise ValueError(
                f"the state before step {step} was asked for; step {self.buffer.next_step} is next"
            )
        return ProducerState(
            format=_STATE_FORMAT,
            buffer=self.buffer.state_dict(),
            prompts=self._prompts.state_dict(),
        )

    async def load_state_dict(self, state: ProducerState) -> None:
        """Go on from a saved state, whatever was generated since; nothing starts before publish().

        The journal ends where the state does. ValueError: the state is not usable.
        """
        if state.format != _STATE_FORMAT:
            raise ValueError(f"rollout state {state.format}; this version reads {_STATE_FORMAT}")
        for group in state.buffer.accepted:
            for sample in group.samples:
                sample.check()
        await self.close()
        async with self._delivery:
            self.buffer.load_state_dict(state.buffer)
            self._prompts.load_state_dict(state.prompts)
            self._delivered.clear()
            self._times.clear()
            await asyncio.to_thread(drop_steps, self._rollouts, state.buffer.next_step)

    async def close(self) -> None:
        """Stop generating."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_for(self, step: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self.failure is not None
                    or self.buffer.next_step > step
                    or self.buffer.may_take()
                )
            )

    async def _deliver(self, step: int) -> tuple[StepBatch, list[Sample]]:
        """Take and journal a step once, however many ranks ask at the same time.

        Under the lock: a rank that asks while the step is being written waits for the file.
        """
        async with self._delivery:
            if step in self._delivered:
                return self._delivered[step]
            if self.failure is not None:
                raise ProducerFailure(self.failure)
            if step < self.buffer.next_step:
                return await asyncio.to_thread(read_step, step_path(self._rollouts, step))
            dropped = self.buffer.dropped
            groups = self.buffer.take()
            assert groups is not None, "the buffer promised a batch"
            kept = keep_widest(groups, self._keep_share)
            dropped["low_spread"] += len(groups) - len(kept)
            now = time.monotonic()  # groups that came with a checkpoint have no times
            times = [self._times.pop(group.group_id, (now, now)) for group in groups]
            seconds = max(end for _, end in times) - min(start for start, _ in times)
            batch, samples = make_batch(step, kept, seconds, dropped)
            if all(sample.status is Status.FAILED for sample in samples):
                self._fail(f"every sample of step {step} failed: {samples[0].metadata['error']}")
                raise ProducerFailure(str(self.failure))
            try:
                await asyncio.to_thread(write_step, self._rollouts, batch, samples)
            except OSError as error:
                self._fail(f"the journal cannot be written: {error}")
                raise ProducerFailure(str(self.failure)) from error
            logger.info(
                "step %d: %d samples, reward %.3f, staleness %d, %.0f tokens/s",
                step,
                len(samples),
                batch.metrics["rollout/reward_mean"],
                batch.staleness_max,
                batch.metrics["rollout/tokens_per_s"],
            )
            self._delivered[step] = (batch, samples)
            self._delivered.pop(step - _STEPS_IN_MEMORY, None)
            return self._delivered[step]

    def _admit(self) -> None:
        while self.failure is None and len(self._tasks) < self._max_running_groups:
            if (lease := self.buffer.lease()) is None:
                return
            task = asyncio.create_task(self._run(lease), name=f"group {lease.group_id}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._admit()

    async def _run(self, lease: Lease) -> None:
        try:
            start = time.monotonic()
            samples = await self._generate(lease)
            self._times[lease.group_id] = (start, time.monotonic())
            group = Group(
                group_id=lease.group_id, start_version=lease.start_version, samples=samples
            )
            why = self._filters.reason(group)
        except (EngineFailure, FilterFailure) as error:
            self._fail(str(error))
        except Exception as error:
            # The environment boundary: its constructor is foreign code. Whatever ended this group
            # must reach the trainers as the reason; they would wait for it otherwise.
            logger.exception("group %d", lease.group_id)
            self._fail(f"group {lease.group_id}: {type(error).__name__}: {error}")
        else:
            if why:
                self._drop(group, why)
            else:
                self.buffer.accept(group)
        async with self._changed:
            self._changed.notify_all()

    def _drop(self, group: Group, why: str) -> None:
        """Not wanted: its lease is free again, but not without end."""
        self._times.pop(group.group_id)
        self.buffer.drop(group.group_id, why)
        if self.buffer.dropped.total() > self._max_dropped_per_step:
            counts = ", ".join(f"{n} {name}" for name, n in self.buffer.dropped.most_common())
            error = next((s.metadata["error"] for s in group.samples if "error" in s.metadata), "")
            self._fail(
                f"step {self.buffer.next_step}: rollout.filters dropped {counts}; more than "
                "rollout.max_refills times the groups of a step. Is the task too hard or too easy "
                f"for this policy?{f' Last failure: {error}' if error else ''}"
            )

    async def _generate(self, lease: Lease) -> list[Sample]:
        environments = self._prompts.environments(lease.group_id, self._samples_per_prompt)
        episodes = [
            Episode(
                environment=environment,
                group_id=lease.group_id,
                index=index,
                seed=derive_seed(self._seed, lease.group_id, index, lease.start_version),
            )
            for index, environment in enumerate(environments)
        ]
        return await self._generator.run(episodes, lease.start_version)

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            logger.error("generation ended: %s", reason)
        self.failed.set()
