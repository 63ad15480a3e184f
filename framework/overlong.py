"""batch.overlong=truncate: samples over the token budget lose the end of their response.

Every rank shortens the metadata alike, so that all make the same plan; a sample's owner shortens
its arrays. How many of the policy's tokens are left only the owner can count, so that is reduced.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from rollout.types import Sample, SampleInfo, Status, StepBatch


def shorten_batch(batch: StepBatch, limit: int) -> tuple[StepBatch, dict[int, int]]:
    """The batch with no sample over `limit` tokens, and how many tokens each sample lost.

    Reward and group stay as they were. num_loss_tokens of a shortened sample is an upper bound
    until `recount`.

    Raises:
        ValueError: a prompt alone fills the budget.
    """
    infos, lost = list(batch.samples), {}
    for i, info in enumerate(infos):
        excess = info.prompt_length + info.response_length - limit
        if excess <= 0:
            continue
        if excess >= info.response_length:
            raise ValueError(
                f"sample {i}: its prompt of {info.prompt_length} tokens leaves no room for a "
                f"response in a micro-batch of {limit} tokens: raise "
                "batch.max_tokens_per_microbatch"
            )
        infos[i] = _with_response(info, info.response_length - excess)
        lost[i] = excess
    return (replace(batch, samples=infos), lost) if lost else (batch, lost)


def shorten_sample(sample: Sample, response_length: int) -> Sample:
    """The sample with the first `response_length` tokens of its response."""
    end = response_length
    turns = int((sample.turn_starts < end).sum())
    return replace(
        sample,
        tokens=sample.tokens[: sample.prompt_length + end],
        loss_mask=sample.loss_mask[:end],
        rollout_logprobs=sample.rollout_logprobs[:end],
        versions=sample.versions[:end],
        teacher_logprobs=(
            None if sample.teacher_logprobs is None else sample.teacher_logprobs[:end]
        ),
        teacher_top_ids=None if sample.teacher_top_ids is None else sample.teacher_top_ids[:end],
        teacher_top_logprobs=(
            None if sample.teacher_top_logprobs is None else sample.teacher_top_logprobs[:end]
        ),
        routes=None if sample.routes is None else sample.routes[: sample.prompt_length + end - 1],
        turn_starts=sample.turn_starts[:turns],
        turn_states=sample.turn_states[:turns],
        turn_rewards=sample.turn_rewards[:turns],
        status=sample.status if sample.status == Status.FAILED else Status.TRUNCATED,
    )


def recount(
    batch: StepBatch, shortened: Mapping[int, int], mine: Mapping[int, Sample]
) -> StepBatch:
    """The batch with num_loss_tokens of shortened samples as their owners count them.

    Collective over all trainers where anything was shortened.

    Args:
        shortened: keys are places in the batch, the same on every rank.
        mine: this rank's samples by place, shortened already.
    """
    if not shortened:
        return batch
    order = sorted(shortened)
    counts = torch.zeros(len(order), dtype=torch.int64)
    for at, i in enumerate(order):
        if i in mine:
            counts[at] = int(mine[i].loss_mask.sum())
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    infos = list(batch.samples)
    for i, count in zip(order, counts.tolist(), strict=True):
        infos[i] = replace(infos[i], num_loss_tokens=count)
    return replace(batch, samples=infos)


def _with_response(info: SampleInfo, length: int) -> SampleInfo:
    turns = sum(start < length for start in info.turn_starts)
    return replace(
        info,
        response_length=length,
        num_loss_tokens=min(info.num_loss_tokens, length),
        turn_starts=info.turn_starts[:turns],
        turn_states=info.turn_states[:turns],
        turn_rewards=info.turn_rewards[:turns],
    )
