"""How long an episode's first prompt may be: trainers must have room for it and its response.

It is counted before anything is sampled: a journaled sample that no micro-batch holds would end
the run, and every attempt to go on with it.
"""

from dataclasses import dataclass

from rollout.config import RolloutBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBound:
    """The longest prompt, and what leaves no more."""

    max_tokens: int
    reason: str

    def check(self, num_tokens: int) -> None:
        """ValueError: too long; one line with both numbers and what to change."""
        if num_tokens > self.max_tokens:
            raise ValueError(f"a prompt of {num_tokens} tokens, {self.reason}")


def bound_prompts(batch: RolloutBatch, *, cp: int, max_new_tokens: int) -> PromptBound:
    """What batch.max_tokens_per_microbatch leaves beside responses of max_new_tokens; with
    batch.overlong=truncate beside a single token.

    Context parallelism pads every sequence to a multiple of 2 * cp.
    """
    budget, multiple = batch.max_tokens_per_microbatch, 2 * cp if cp > 1 else 1
    room = budget // multiple * multiple
    key = f"batch.max_tokens_per_microbatch={budget}"
    if batch.overlong == "truncate":
        most = room - 1
        reason = f"more than the {most} that {key} leaves beside a response of one: raise it"
    else:
        most = room - max_new_tokens
        reason = (
            f"more than the {most} that {key} leaves beside a response of "
            f"{max_new_tokens} (max_new_tokens): raise it, lower the other, or set "
            "batch.overlong=truncate"
        )
    return PromptBound(max_tokens=most, reason=reason)
