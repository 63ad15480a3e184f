"""A teacher's opinion of every token that the policy sampled: `rollout.teacher`.

The teacher is a side model of kind generate, asked to score the samples' own token ids; its
log-probs travel with the samples (arXiv 2306.13649; framework/algorithm/tokens/ uses them).
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from rollout.boundary import failed_sample
from rollout.client import EngineClient, EngineRefusal, check_not_aborted
from rollout.config import RolloutConfig
from rollout.engine_reply import SCORED_BYTES, SEQUENCE_BYTES, Finish
from rollout.reply_numbers import Logprob, TokenId
from rollout.side_models import SideModels
from rollout.teacher_tokenizer import check_tokenizer
from rollout.together import ask_all
from rollout.tokens import Chat
from rollout.types import Sample, Status

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_teacher(
    rollout: RolloutConfig, side_models: SideModels, chat: Chat
) -> AsyncIterator["Teacher | None"]:
    """The run's teacher; None where it has none. Its server must have an address by now.

    Raises ValueError where rollout.teacher names no side model, or one of another tokenizer.
    """
    name = rollout.teacher
    if not name:
        yield None
        return
    if (model := side_models.models.get(name)) is None:
        raise ValueError(f"rollout.teacher={name}: no such model in rollout.side_models")

    def find_urls() -> list[str]:
        found = side_models.find(name)
        return [] if found is None else [found[0]]

    url, api_key = side_models.find(name) or ("", "")
    await check_tokenizer(f"rollout.teacher={name}", url, api_key, chat)
    async with EngineClient(
        find_urls(),
        api_key,
        model.engine_config(rollout.engine),
        find_urls if model.model_path else None,
        what=f"rollout.teacher={name}",
    ) as client:
        yield Teacher(client, rollout.teacher_top_k)


Scored = tuple[Logprob | None, TokenId, str | None]
"""(log-prob, token id, text), as SGLang tells them."""


class _Meta(msgspec.Struct):
    finish_reason: Finish
    input_token_logprobs: list[Scored]
    input_top_logprobs: list[list[Scored] | None] = []
    """Of the same positions."""


class _Reply(msgspec.Struct):
    meta_info: _Meta


_decode_replies = msgspec.json.Decoder(list[_Reply]).decode


class Teacher:
    """Scores samples by its own log-probs at temperature 1."""

    def __init__(self, client: EngineClient, top_k: int = 0) -> None:
        """client: of the teacher's server. top_k: so many of its likeliest tokens are told too."""
        self._client = client
        self._top_k = top_k

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with teacher_logprobs, and teacher_top_ids and teacher_top_logprobs where the
        likeliest tokens are wanted; those that failed, which train nothing, get zeros. One that the
        teacher refuses fails.

        Raises EngineFailure where the teacher gives no answer within its bounds.
        """
        asked = [k for k, sample in enumerate(samples) if sample.status is not Status.FAILED]
        told = await ask_all(self._ask, [samples[k] for k in asked], EngineRefusal)
        found: dict[int, dict[str, np.ndarray] | EngineRefusal] = dict(
            zip(asked, told, strict=True)
        )
        scored = []
        for k, sample in enumerate(samples):
            row = found.get(k)
            if isinstance(row, EngineRefusal):
                sample = failed_sample(sample, str(row))
                logger.warning("sample %d/%d failed: %s", sample.group_id, sample.index, row)
            fields = row if isinstance(row, dict) else _zeros(sample, self._top_k)
            scored.append(replace(sample, **fields))
        return scored

    async def _ask(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """Fields of each sample: log p(token | all before it), 0 where the policy did not write it,
        and the likeliest tokens in its place.
        """
        if not samples:
            return []
        body = {
            "input_ids": [sample.tokens.tolist() for sample in samples],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            # One before the first that is asked for: what comes first has no log-prob.
            "logprob_start_len": [sample.prompt_length - 1 for sample in samples],
        }
        if self._top_k:
            body["top_logprobs_num"] = [self._top_k] * len(samples)

        def read(url: str, data: bytes) -> list[dict[str, np.ndarray]]:
            replies = _decode_replies(data)
            if len(replies) != len(samples):
                raise ValueError(f"{len(replies)} replies to {len(samples)} samples")
            for reply in replies:
                check_not_aborted(url, reply.meta_info.finish_reason)
            return [
                {
                    "teacher_logprobs": _logprobs(sample, reply.meta_info.input_token_logprobs),
                    **_top(sample, reply.meta_info.input_top_logprobs, self._top_k),
                }
                for sample, reply in zip(samples, replies, strict=True)
            ]

        told = sum(len(sample.tokens) for sample in samples) * (1 + self._top_k)
        max_bytes = len(samples) * SEQUENCE_BYTES + told * SCORED_BYTES
        return await self._client.request(body, read, max_bytes)


def _zeros(sample: Sample, k: int) -> dict[str, np.ndarray]:
    """The fields of a sample that is not asked about."""
    length = sample.response_length
    fields: dict[str, np.ndarray] = {"teacher_logprobs": np.zeros(length, dtype=np.float32)}
    if k:
        fields["teacher_top_ids"] = np.zeros((length, k), dtype=np.int32)
        fields["teacher_top_logprobs"] = np.zeros((length, k), dtype=np.float32)
    return fields


def _top(sample: Sample, scored: Sequence[list[Scored] | None], k: int) -> dict[str, np.ndarray]:
    """teacher_top_ids and teacher_top_logprobs, [R, k]; neither where k is 0."""
    if not k:
        return {}
    rows = [row or [] for row in scored[max(0, len(scored) - sample.response_length) :]]
    if [len(row) for row in rows] != [k] * sample.response_length:
        raise ValueError(f"not {k} likeliest tokens in place of each of the response's")
    values = [[np.nan if value is None else value for value, *_ in row] for row in rows]
    logprobs = np.array(values, dtype=np.float32).reshape(-1, k)
    if not (logprobs <= 1e-6).all():  # nor NaN
        raise ValueError("the log-prob of a likeliest token is not a number <= 0")
    ids = np.array([[token for _, token, _ in row] for row in rows], dtype=np.int32).reshape(-1, k)
    if (np.diff(np.sort(ids)) == 0).any():
        raise ValueError(f"a token is told twice among the {k} likeliest in one place")
    return {"teacher_top_ids": ids, "teacher_top_logprobs": logprobs}


def _logprobs(sample: Sample, scored: list[Scored]) -> np.ndarray:
    """Check one reply and bring it into an array; ValueError says what does not fit."""
    response = sample.tokens[sample.prompt_length :].tolist()
    rows = scored[len(scored) - len(response) :]
    # SGLang 0.5.23 tells the vocabulary's last token as 0 there; its log-prob is the right one.
    if len(rows) != len(response) or any(
        told not in (token, 0) for (_, told, _), token in zip(rows, response, strict=True)
    ):
        raise ValueError(f"the log-probs are not those of the {len(response)} tokens")
    values = np.array([np.nan if value is None else value for value, _, _ in rows])
    if not (values <= 1e-6).all():  # nor NaN
        raise ValueError("a log-prob is not a number <= 0")
    return (values * sample.loss_mask).astype(np.float32)
