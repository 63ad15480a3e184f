"""Batches for stage=sft: the task's own demonstrations, as the trainers take them from a buffer."""

from typing import Any

from rollout.config import DataConfig
from rollout.data import demonstrations
from rollout.types import EvalResult, Sample, SampleInfo, StepBatch


class DemonstrationSource:
    """A BatchSource without engines: step s holds demonstrations s * B to (s + 1) * B - 1."""

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int, batch_size: int) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._batch_size = batch_size
        self._step, self._samples = -1, []

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
        raise ValueError("stage=sft has no engine to evaluate with; evaluate its hf/ by mode=eval")

    def snapshot(self, version: int) -> bytes:
        """A batch is a function of its step."""
        return b""

    def restore(self, state: bytes) -> None:
        """The step is enough."""

    def finish(self) -> None:
        """Nothing to end."""

    def _load(self, step: int) -> list[Sample]:
        if step != self._step:
            start = step * self._batch_size
            self._samples = demonstrations(
                self._data, self._tokenizer, self._seed, start, self._batch_size
            )
            self._step = step
        return self._samples
