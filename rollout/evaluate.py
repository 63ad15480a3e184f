"""Accuracy on held-out prompts, with seeds that do not depend on the version."""

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from rollout.client import EngineFailure
from rollout.data import PromptStream
from rollout.eval_sets import EvalSettings, summarize
from rollout.generate import Episode, Generator
from rollout.journal import trim_lines
from rollout.seeds import derive_seed
from rollout.together import run_together
from rollout.tokens import Chat
from rollout.types import EvalResult, Sample, Status

_EPISODES_PER_REQUEST = 64
_NUM_TEXTS = 8


@dataclass(kw_only=True, slots=True)
class EvalSet:
    """What is needed to measure one set."""

    settings: EvalSettings
    prompts: PromptStream
    generator: Generator

    @property
    def num_prompts(self) -> int:
        """As configured; else all there are."""
        return self.settings.num_prompts or self.prompts.num_prompts

    def episodes(self, indices: range) -> list[Episode]:
        """All episodes of these prompts, with seeds that do not depend on the version."""
        found = []
        for index in indices:
            environments = self.prompts.environments(index, self.settings.samples_per_prompt)
            for place, environment in enumerate(environments):
                seed = derive_seed(self.settings.seed, "eval", index, *([place] if place else []))
                found.append(
                    Episode(environment=environment, group_id=index, index=place, seed=seed)
                )
        return found


class Evaluator:
    """Measures the policy that the engines serve; the same weights give the same figures."""

    def __init__(self, *, sets: list[EvalSet], chat: Chat, results: Path) -> None:
        """results: eval.jsonl, to which every evaluation adds a line."""
        self._sets = sets
        self._chat = chat
        self._results = results
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
        measured = await run_together(self._measure_set(each, version) for each in self._sets)
        own = [
            sample
            for each, groups in zip(self._sets, measured, strict=True)
            if each.settings.in_total
            for (sample,) in groups
        ]
        total = summarize([[sample] for sample in own])
        result = EvalResult(
            version=version,
            accuracy=total.accuracy,
            reward_mean=total.reward_mean,
            failed_fraction=total.failed_fraction,
            num_prompts=total.num_prompts,
            response_length_mean=total.response_length_mean,
            time_s=time.monotonic() - start,
            sets={
                each.settings.name: summarize(groups)
                for each, groups in zip(self._sets, measured, strict=True)
                if each.settings.name
            },
        )
        await asyncio.to_thread(self._write, result, own[:_NUM_TEXTS])
        return result

    async def _measure_set(self, of: EvalSet, version: int) -> list[list[Sample]]:
        """The samples of each prompt."""
        count = of.num_prompts
        # All samples of a prompt in one: a reward of whole groups compares them.
        size = max(1, _EPISODES_PER_REQUEST // of.settings.samples_per_prompt)
        chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        parts = await run_together(
            of.generator.run(of.episodes(chunk), version) for chunk in chunks
        )
        found: list[dict[int, Sample]] = [{} for _ in range(count)]
        for sample in (sample for part in parts for sample in part):
            # Of an episode that gave several samples, the first counts.
            found[sample.group_id].setdefault(sample.index, sample)
        groups = [[*of_prompt.values()] for of_prompt in found]
        samples = [sample for group in groups for sample in group]
        name = f" of {of.settings.name}" if of.settings.name else ""
        seen = {int(v) for sample in samples for v in sample.versions if v >= 0}
        if seen - {version}:
            raise EngineFailure(
                f"evaluation of version {version}{name}: the engines sampled with {sorted(seen)}"
            )
        if all(sample.status is Status.FAILED for sample in samples):
            raise EngineFailure(
                f"every sample of the evaluation{name} failed: "
                f"{samples[0].metadata.get('error', '')}"
            )
        return groups

    def _recorded(self, version: int) -> EvalResult | None:
        """What eval.jsonl ends with, where that is this version."""
        if not self._results.exists():
            return None
        data = self._results.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()  # the last one may be torn
        last = json.loads(lines[-1]) if lines else {"version": -1}
        if last["version"] != version:
            return None
        return msgspec.convert(last, EvalResult)

    async def forget_after(self, version: int) -> None:
        """Drop the results of later versions: the run goes on from this one."""
        self._last = None
        await asyncio.to_thread(trim_lines, self._results, "version", version)

    def _write(self, result: EvalResult, samples: list[Sample]) -> None:
        chat = self._chat
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
