"""Batches of the stages without engines, as the trainers take them from a buffer."""

from collections.abc import Callable
from typing import Any

from framework.config import RunConfig
from rollout.conversations import Conversations
from rollout.data import demonstrations
from rollout.preferences import FilePreferences, open_preferences
from rollout.tokens import Chat
from rollout.types import EvalResult, Sample, SampleInfo, StepBatch

HELD_OUT = -1
"""In place of a step: the samples that are never trained on."""


class DemonstrationSource:
    """A BatchSource without engines: a batch is a function of its step."""

    def __init__(self, make: Callable[[int], list[Sample]]) -> None:
        """make: the samples of a step, or of HELD_OUT."""
        self._make = make
        self._step, self._samples = None, []

    def take(self, step: int) -> StepBatch:
        """Metadata of the step's batch."""
        infos = [
            SampleInfo(
                group_id=sample.group_id,
                index=sample.index,
                prompt_length=sample.prompt_length,
                response_length=sample.response_length,
                num_loss_tokens=int(sample.loss_mask.sum()),
                reward=sample.reward,
                version=step,
            )
            for sample in self._load(step)
        ]
        return StepBatch(step=step, samples=infos, staleness_max=0, metrics={})

    def fetch(self, step: int, indices: list[int]) -> list[Sample]:
        """The samples themselves."""
        samples = self._load(step)
        return [samples[i] for i in indices]

    def publish(self, version: int) -> None:
        """Nobody waits for versions here."""

    def evaluate(self, version: int) -> EvalResult:
        """Not offered: measuring needs an engine."""
        raise ValueError("this stage has no engine to evaluate with; evaluate its hf/ by mode=eval")

    def snapshot(self, version: int) -> bytes:
        """A batch is a function of its step."""
        return b""

    def restore(self, step: int, state: bytes) -> None:
        """The step is enough."""

    def finish(self) -> None:
        """Nothing to end."""

    def missing(self) -> str:
        """A batch is made where it is asked for."""
        return ""

    def _load(self, step: int) -> list[Sample]:
        if step != self._step:
            self._samples, self._step = self._make(step), step
        return self._samples


def demonstration_source(config: RunConfig, tokenizer: Any) -> DemonstrationSource:
    """stage=sft: step s holds records s * B to (s + 1) * B - 1 of data.path, or of the task's
    demonstrations."""
    count = config.warm_start.batch_size
    if config.data.path:
        chat, conversations = Chat(tokenizer), Conversations(config.data)
        if config.batch.overlong == "refuse":
            conversations.check_lengths(chat, *_budget(config))
        return DemonstrationSource(
            lambda step: conversations.batch(chat, config.seed, step * count, count)
        )

    def make(step: int) -> list[Sample]:
        return demonstrations(config.data, tokenizer, config.seed, step * count, count)

    return DemonstrationSource(make)


def preference_source(config: RunConfig, tokenizer: Any, *, paired: bool) -> DemonstrationSource:
    """stage=preference: pairs, or labelled answers, of a file or of the task."""
    preferences = open_preferences(config.data, Chat(tokenizer), config.seed, paired=paired)
    count = config.preference.batch_size
    if isinstance(preferences, FilePreferences) and config.batch.overlong == "refuse":
        preferences.check_lengths(*_budget(config))

    def make(step: int) -> list[Sample]:
        if step == HELD_OUT:
            return preferences.held_out()
        return preferences.batch(step * count, count)

    return DemonstrationSource(make)


def _budget(config: RunConfig) -> tuple[int, int]:
    """Tokens of a micro-batch, and what sequences are padded to a multiple of."""
    cp = config.parallel.cp
    return config.batch.max_tokens_per_microbatch, 2 * cp if cp > 1 else 1
