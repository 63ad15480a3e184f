"""Accuracy on held-out prompts: one sample each, with seeds that do not depend on the version."""

import asyncio
import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

from rollout.client import EngineFailure
from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.environments import Environment
from rollout.generate import Episode, Generator, run_together
from rollout.journal import trim_lines
from rollout.seeds import derive_seed
from rollout.types import EvalResult, Sample, Status

_PROMPTS_PER_REQUEST = 64
_NUM_TEXTS = 8


class Evaluator:
    """Measures the policy that the engines serve; the same weights give the same figures."""

    def __init__(self, *, data: DataConfig, seed: int, generator: Generator, results: Path) -> None:
        """results: eval.jsonl, to which every evaluation adds a line."""
        self._data = data
        self._seed = seed
        sampling = replace(generator.sampling, temperature=data.eval_temperature)
        self._generator = replace(generator, sampling=sampling)
        self._results = results
        self._prompts = PromptStream(data, seed, "eval")
        self._last: EvalResult | None = None
        self._running = asyncio.Lock()

    async def run(self, version: int) -> EvalResult:
        """Evaluate `version`; EngineFailure when the engines serve another one.

        Asked again, as by a trainer that lost the answer, it tells the same and adds no line.
        """
        async with self._running:
            if self._last is None or self._last.version != version:
                recorded = await asyncio.to_thread(self._recorded, version)
                self._last = recorded or await self._measure(version)
            return self._last

    async def _measure(self, version: int) -> EvalResult:
        start = time.monotonic()
        count = self._data.eval_num_prompts
        chunks = [
            range(first, min(first + _PROMPTS_PER_REQUEST, count))
            for first in range(0, count, _PROMPTS_PER_REQUEST)
        ]
        parts = await run_together(self._chunk(chunk, version) for chunk in chunks)
        # Of an episode that gave several samples, the first counts.
        samples = [sample for part in parts for sample in part if sample.index == 0]
        seen = {int(v) for sample in samples for v in sample.versions if v >= 0}
        if seen - {version}:
            raise EngineFailure(
                f"evaluation of version {version}: the engines sampled with {sorted(seen)}"
            )
        failed = [sample for sample in samples if sample.status is Status.FAILED]
        if len(failed) == count:
            raise EngineFailure(
                f"every sample of the evaluation failed: {failed[0].metadata.get('error', '')}"
            )
        lengths = [sample.response_length for sample in samples]
        result = EvalResult(
            version=version,
            accuracy=sum(sample.right for sample in samples) / count,
            reward_mean=sum(sample.reward for sample in samples) / count,
            failed_fraction=len(failed) / count,
            num_prompts=count,
            response_length_mean=sum(lengths) / count,
            time_s=time.monotonic() - start,
        )
        await asyncio.to_thread(self._write, result, samples[:_NUM_TEXTS])
        return result

    def _recorded(self, version: int) -> EvalResult | None:
        """What eval.jsonl ends with, where that is this version."""
        if not self._results.exists():
            return None
        data = self._results.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()  # the last one may be torn
        last = json.loads(lines[-1]) if lines else {"version": -1}
        if last["version"] != version:
            return None
        return EvalResult(**{each.name: last[each.name] for each in fields(EvalResult)})

    async def forget_after(self, version: int) -> None:
        """Drop the results of later versions: the run goes on from this one."""
        self._last = None
        await asyncio.to_thread(trim_lines, self._results, "version", version)

    async def _chunk(self, indices: range, version: int) -> list[Sample]:
        episodes = [self._episode(index) for index in indices]
        return await self._generator.run(episodes, version)

    def _episode(self, index: int) -> Episode:
        environment: Environment
        (environment,) = self._prompts.environments(index, 1)
        seed = derive_seed(self._seed, "eval", index)
        return Episode(environment=environment, group_id=index, index=0, seed=seed)

    def _write(self, result: EvalResult, samples: list[Sample]) -> None:
        chat = self._generator.chat
        texts = [
            {
                "prompt": chat.text(sample.tokens[: sample.prompt_length]),
                "response": chat.text(sample.tokens[sample.prompt_length :]),
                "reward": sample.reward,
                "status": sample.status.value,
            }
            | sample.metadata
            for sample in samples
        ]
        line = json.dumps(asdict(result) | {"samples": texts})
        with self._results.open("a") as file:
            file.write(line + "\n")
