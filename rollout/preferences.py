"""Preferences as samples: from a JSONL file, or made from a task's right answers and near misses.

Two samples a unit, log-probs and versions 0. Pairs: index 0 is the chosen answer, with reward 1,
index 1 the rejected one, with reward 0. Labelled answers: index 0 is the answer, with reward 1
(good) or 0 (bad); index 1 its prompt with the answer of the batch's next unit, whose only use is to
estimate how far the policy is from the reference.
"""

import asyncio
import functools
import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from rollout.config import DataConfig
from rollout.data import PromptStream, play
from rollout.environments.base import Message
from rollout.preference_file import PreferenceFile, Record
from rollout.seeds import derive_seed, held_out
from rollout.tokens import Chat, Transcript
from rollout.types import Sample

_MAX_DRAWS = 16
"""Of a near miss, until one is wrong."""
_MAX_PROMPTS = 32
_NEXT_PROMPT = 1 << 40
"""Further than any run gets."""


class Preferences(Protocol):
    """Units in an order that is a pure function of the seed."""

    def batch(self, start: int, count: int) -> list[Sample]:
        """Units start .. start + count - 1: 2 * count samples."""
        ...

    def held_out(self) -> list[Sample]:
        """At most data.eval_num_prompts units that `batch` never gives."""
        ...


def open_preferences(data: DataConfig, chat: Chat, seed: int, *, paired: bool) -> Preferences:
    """data.path, or the task.

    Raises:
        ValueError: names the key, and the file's line.
    """
    kind: Any = FilePreferences if data.path else TaskPreferences
    return kind(data, chat, seed, paired=paired)


class TaskPreferences:
    """The demonstration of each prompt against a near miss that the environment calls worse."""

    def __init__(self, data: DataConfig, chat: Chat, seed: int, *, paired: bool) -> None:
        self._chat, self._seed, self._paired = chat, seed, paired
        self._count = data.eval_num_prompts
        self._train = PromptStream(data, seed, "preference")
        self._eval = PromptStream(data, seed, "eval")

    def batch(self, start: int, count: int) -> list[Sample]:
        """See Preferences. Not to be called from a running event loop."""
        return self._units(self._train, start, count)

    def held_out(self) -> list[Sample]:
        """See Preferences."""
        return self._units(self._eval, 0, self._count)

    def _units(self, stream: PromptStream, start: int, count: int) -> list[Sample]:
        async def render() -> list[Sample]:
            return [
                each
                for k in range(start, start + count)
                for each in await _task_pair(self._chat, stream, self._seed, k)
            ]

        pairs = asyncio.run(render())
        if self._paired:
            return pairs
        bad = [derive_seed(self._seed, "label", k, bits=1) for k in range(start, start + count)]
        return with_unrelated([pairs[2 * i + bad[i]] for i in range(count)])


async def _task_pair(chat: Chat, stream: PromptStream, seed: int, index: int) -> list[Sample]:
    """Of prompt `index`; where its demonstration is no better than its mistakes (some tasks show
    wrong ones on purpose), of a prompt that no other index stands for."""
    draws = random.Random(derive_seed(seed, "mistake", index))
    for k in range(_MAX_PROMPTS):
        prompt = index + k * _NEXT_PROMPT
        (environment,) = stream.environments(prompt, 1)
        replies, limit_s = environment.demonstration(), stream.timeout_s
        right = await play(chat, environment, replies, limit_s, group_id=index, index=0)
        for _ in range(_MAX_DRAWS):
            (environment,) = stream.environments(prompt, 1)
            replies = environment.mistake(draws)
            wrong = await play(chat, environment, replies, limit_s, group_id=index, index=1)
            if wrong.reward < right.reward:
                return [replace(right, reward=1.0), replace(wrong, reward=0.0)]
    raise ValueError(
        f"{type(environment).__name__}: {_MAX_DRAWS} draws of mistake() for each of {_MAX_PROMPTS} "
        "prompts were all rewarded like its demonstration; preferences need a wrong answer"
    )


@dataclass(frozen=True, kw_only=True)
class Files:
    """Which lines are trained on and which are not."""

    train: PreferenceFile
    train_lines: list[int]
    held_out: PreferenceFile
    held_out_lines: list[int]


def open_files(data: DataConfig, *, paired: bool) -> Files:
    """data.path and data.eval_path, every line checked.

    Raises:
        ValueError: malformed lines; nothing is left to train or to evaluate on.
    """
    train = _open("data.path", data.path, paired)
    lines = range(len(train))
    if data.eval_path:
        other = _open("data.eval_path", data.eval_path, paired)
        every = list(range(len(other)))
        return Files(train=train, train_lines=list(lines), held_out=other, held_out_lines=every)
    aside = [held_out(identity) for identity in train.identities]
    files = Files(
        train=train,
        train_lines=[i for i in lines if not aside[i]],
        held_out=train,
        held_out_lines=[i for i in lines if aside[i]],
    )
    if not files.train_lines or len(files.held_out_lines) < (1 if paired else 2):
        raise ValueError(
            f"data.path={data.path}: its {len(train)} lines have too few prompts to hold an eighth "
            "of them out for evaluation; set data.eval_path"
        )
    return files


class FilePreferences:
    """Records of a file, each epoch in an order of its own."""

    def __init__(self, data: DataConfig, chat: Chat, seed: int, *, paired: bool) -> None:
        """Raises ValueError as open_files does."""
        self._chat, self._seed, self._paired = chat, seed, paired
        self._count = data.eval_num_prompts
        self._files = open_files(data, paired=paired)

    def batch(self, start: int, count: int) -> list[Sample]:
        """See Preferences."""
        size = len(self._files.train_lines)
        order = [self._epoch(k // size)[k % size] for k in range(start, start + count)]
        return self._units([self._files.train.record(i) for i in order], start)

    def held_out(self) -> list[Sample]:
        """See Preferences."""
        lines = list(self._files.held_out_lines)
        random.Random(derive_seed(self._seed, "held_out")).shuffle(lines)
        chosen = lines[: self._count]
        return self._units([self._files.held_out.record(i) for i in chosen], 0)

    def check_lengths(self, max_tokens: int, multiple: int) -> None:
        """Raise ValueError for a line that no micro-batch can hold. Tokenises every line once."""
        files, prompts, answers = self._files, {}, {}
        for file, lines in (
            (files.train, files.train_lines),
            (files.held_out, files.held_out_lines),
        ):
            for i in lines:
                record = file.record(i)
                samples = self._units([record], 0)[: 1 + self._paired]
                sizes = [-(-len(sample.tokens) // multiple) * multiple for sample in samples]
                if sum(sizes) > max_tokens:
                    raise ValueError(f"{record.where}: {_too_long(sum(sizes), max_tokens)}")
                prompts[samples[0].prompt_length] = record.where
                answers[samples[0].response_length] = record.where
        longest, answer = max(prompts), max(answers)
        if not self._paired and longest + answer + multiple > max_tokens:
            raise ValueError(
                f"{prompts[longest]}: with the answer of {answers[answer]}, by which a KL is "
                f"estimated, {_too_long(longest + answer + multiple, max_tokens)}"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019  # lives as long as the run
    def _epoch(self, epoch: int) -> list[int]:
        order = list(self._files.train_lines)
        random.Random(derive_seed(self._seed, "epoch", epoch)).shuffle(order)
        return order

    def _units(self, records: list[Record], start: int) -> list[Sample]:
        answers = [
            [
                answer_sample(
                    self._chat,
                    record.prompt,
                    answer,
                    group_id=start + k,
                    index=index,
                    reward=float(record.label and index == 0),
                    where=record.where,
                    margin=record.margin,
                )
                for index, answer in enumerate((record.chosen, record.rejected)[: 1 + self._paired])
            ]
            for k, record in enumerate(records)
        ]
        flat = [sample for pair in answers for sample in pair]
        return flat if self._paired else with_unrelated(flat)


def _too_long(size: int, max_tokens: int) -> str:
    return (
        f"{size} tokens that are trained together, more than batch.max_tokens_per_microbatch="
        f"{max_tokens}: raise it, or set batch.overlong=truncate"
    )


def _open(key: str, path: str, paired: bool) -> PreferenceFile:
    try:
        return PreferenceFile(path, paired=paired)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def answer_sample(
    chat: Chat,
    prompt: list[Message],
    answer: list[Message],
    *,
    group_id: int,
    index: int,
    reward: float,
    where: str,
    margin: float = 0.0,
) -> Sample:
    """A conversation as tokens: what the assistant says in `answer` is the policy's."""
    transcript = Transcript(chat.prompt(prompt))
    pending: list[Message] = []
    for message in answer:
        if message["role"] != "assistant":
            pending.append(message)
            continue
        if transcript.response_length:
            transcript.add_observation(chat.continuation(pending, ended=True))
            pending = []
        tokens = [*chat.tokens(message["content"]), chat.end_id]
        transcript.add_reply(tokens, logprobs=[0.0] * len(tokens), versions=[0] * len(tokens))
    sample = transcript.sample(
        group_id=group_id, index=index, reward=reward, metadata={"source": where}
    )
    return replace(sample, rewards={"margin": margin} if margin else {})


def with_unrelated(answers: list[Sample]) -> list[Sample]:
    """After each answer its prompt with the next answer to another prompt, around the end."""
    samples, prompts = [], [tuple(each.tokens[: each.prompt_length]) for each in answers]
    for i, sample in enumerate(answers):
        following = [(i + k) % len(answers) for k in range(1, len(answers))]
        others = [j for j in following if prompts[j] != prompts[i]]
        other = answers[(others or following or [i])[0]]
        prompt, response = (
            sample.tokens[: sample.prompt_length],
            other.tokens[other.prompt_length :],
        )
        unrelated = replace(
            other,
            group_id=sample.group_id,
            index=1,
            tokens=np.concatenate([prompt, response]),
            prompt_length=sample.prompt_length,
        )
        samples += [replace(sample, index=0), unrelated]
    return samples
