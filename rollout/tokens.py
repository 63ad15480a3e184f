"""Text <-> tokens by the tokenizer's chat template. Tokens are the source of truth.

A conversation only grows: what the policy sampled stays as it was sampled, and each further turn
of the environment is rendered alone and appended, never re-tokenised with what came before.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.types import Sample, Status


class Chat:
    """The chat template of one tokenizer (a transformers PreTrainedTokenizer)."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("model.hf_path: its tokenizer has no chat_template")
        if tokenizer.eos_token_id is None:
            raise ValueError("model.hf_path: its tokenizer has no eos_token")
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self.num_tokens = len(tokenizer)

    @classmethod
    def load(cls, hf_path: str) -> "Chat":
        """Read the tokenizer of a Hugging Face directory."""
        # tokenizer.json is the whole tokenizer, and its class costs a quarter of the start-up
        # time of AutoTokenizer, which imports torch; directories without it need the latter.
        if Path(hf_path, "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Tokenizer
        else:
            from transformers import AutoTokenizer as Tokenizer
        try:
            return cls(Tokenizer.from_pretrained(hf_path, local_files_only=True))
        except OSError as error:
            raise ValueError(f"model.hf_path={hf_path!r}: no tokenizer: {error}") from error

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Tokens of a conversation up to where the policy's reply begins.

        tools: JSON schemas, for templates that know of them (`knows`).
        """
        return self.tokens(self._render(messages, tools))

    def knows(self, name: str) -> bool:
        """Whether the template speaks of `tools` or `tool_calls`."""
        return name in self.tokenizer.chat_template

    def continuation(self, messages: Sequence[Mapping[str, Any]], *, ended: bool) -> list[int]:
        """Tokens between one reply of the policy and the next: the environment's messages.

        ended: the reply carries its end token already; else the end token comes first here.
        """
        # Rendered after a stand-in conversation and cut off it: templates render a message alike
        # whatever stands before the last turn, but many refuse one that starts with an answer.
        marker = "reply"
        before: list[Mapping[str, Any]] = [
            {"role": "user", "content": "prompt"},
            {"role": "assistant", "content": marker},
        ]
        text = self._render([*before, *messages])
        _, found, rest = text.partition(marker)
        end_text = self.tokenizer.convert_ids_to_tokens(self.end_id)
        between, has_end, rest = rest.partition(end_text)
        if not found or not has_end or between.strip():
            raise ValueError(
                "model.hf_path: its chat template does not end an assistant message with "
                f"{end_text!r} right after the content; later turns cannot be appended to it"
            )
        return ([] if ended else [self.end_id]) + self.tokens(rest)

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens, special ones visible; ids the tokenizer lacks become U+FFFD."""
        parts: list[str] = []
        known: list[int] = []
        for token in map(int, token_ids):
            if token < self.num_tokens:
                known.append(token)
                continue
            parts += [self._decode(known), "\ufffd"]
            known = []
        return "".join([*parts, self._decode(known)])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, without anything added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Transcript:
    """One episode's tokens as it grows: prompt, then the policy's and the environment's turns."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens = list(prompt)
        self._prompt_length = len(prompt)
        self._mask: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._turn_starts: list[int] = []
        self._turn_states: list[str] = []
        self._turn_rewards: list[float] = []
        self._routes: list[np.ndarray] = []

    @property
    def response_length(self) -> int:
        """Tokens after the prompt so far."""
        return len(self._mask)

    @property
    def num_routes(self) -> int:
        """Tokens whose routes are known: the first so many."""
        return sum(map(len, self._routes))

    def add_reply(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[int],
        state: str = "",
        routes: np.ndarray | None = None,
    ) -> None:
        """A turn of the policy: trained on.

        state: what it faced, see Sample.turn_states; empty: told apart by the turn's number alone.
        routes: Generation.routes. Tokens that have some keep them: those of the pass that the
        policy's choice of the next token came from.
        """
        number = len(self._turn_starts)
        self._turn_starts.append(len(self._mask))
        self._turn_states.append(_digest(state) if state else f"turn {number}")
        self._turn_rewards.append(0.0)
        self.tokens += tokens
        self._mask += [1] * len(tokens)
        self._logprobs += logprobs
        self._versions += versions
        if routes is not None:
            first = len(self.tokens) - 1 - len(routes)
            known = self.num_routes
            if not 0 <= first <= known:
                raise ValueError(f"routes begin at token {first}; {known} tokens have some")
            self._routes.append(routes[known - first :])

    def pay(self, reward: float) -> None:
        """What the environment says the last turn of the policy earned."""
        self._turn_rewards[-1] = reward

    def add_observation(self, tokens: list[int]) -> None:
        """A turn of the environment: seen by the policy, not trained on."""
        self.tokens += tokens
        self._mask += [0] * len(tokens)
        self._logprobs += [0.0] * len(tokens)
        self._versions += [-1] * len(tokens)

    def sample(
        self,
        *,
        group_id: int,
        index: int,
        reward: float = 0.0,
        status: Status = Status.STOPPED,
        metadata: dict[str, str] | None = None,
    ) -> Sample:
        """The episode as arrays."""
        return Sample(
            group_id=group_id,
            index=index,
            tokens=np.array(self.tokens, dtype=np.int32),
            prompt_length=self._prompt_length,
            loss_mask=np.array(self._mask, dtype=np.uint8),
            rollout_logprobs=np.array(self._logprobs, dtype=np.float32),
            versions=np.array(self._versions, dtype=np.int32),
            turn_starts=np.array(self._turn_starts, dtype=np.int32),
            turn_states=list(self._turn_states),
            turn_rewards=list(self._turn_rewards),
            routes=np.concatenate(self._routes) if self._routes else None,
            reward=reward,
            status=status,
            metadata=metadata or {},
        )


def _digest(state: str) -> str:
    """A short name: states may be long, and travel with the metadata to every rank."""
    return hashlib.blake2b(state.encode(), digest_size=8).hexdigest()
