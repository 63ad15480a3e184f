"""Text <-> tokens by the tokenizer's chat template. Tokens are the source of truth.

A conversation only grows: what the policy sampled stays as it was sampled, and each further turn
of the environment is rendered alone and appended, never re-tokenised with what came before.
"""

from collections.abc import Sequence
from typing import Any

from rollout.environments.base import Message


class Chat:
    """The chat template of one tokenizer (a transformers PreTrainedTokenizer)."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("model.hf_path: its tokenizer has no chat_template")
        if tokenizer.eos_token_id is None:
            raise ValueError("model.hf_path: its tokenizer has no eos_token")
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self._num_tokens = len(tokenizer)

    @classmethod
    def load(cls, hf_path: str) -> "Chat":
        """Read the tokenizer of a Hugging Face directory."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(hf_path, local_files_only=True))

    def prompt(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation up to where the policy's reply begins."""
        return self._encode(self._render(messages, add_generation_prompt=True))

    def continuation(self, messages: list[Message], *, ended: bool) -> list[int]:
        """Tokens between one reply of the policy and the next: the environment's messages.

        ended: the reply carries its end token already; else the end token comes first here.
        """
        # Rendered after a stand-in conversation and cut off it: templates render a message alike
        # whatever stands before the last turn, but many refuse one that starts with an answer.
        marker = "reply"
        before: list[Message] = [
            {"role": "user", "content": "prompt"},
            {"role": "assistant", "content": marker},
        ]
        text = self._render(before + messages, add_generation_prompt=True)
        _, found, rest = text.partition(marker)
        end_text = self.tokenizer.convert_ids_to_tokens(self.end_id)
        between, has_end, rest = rest.partition(end_text)
        if not found or not has_end or between.strip():
            raise ValueError(
                "model.hf_path: its chat template does not end an assistant message with "
                f"{end_text!r} right after the content; later turns cannot be appended to it"
            )
        return ([] if ended else [self.end_id]) + self._encode(rest)

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones visible; ids the tokenizer lacks become U+FFFD."""
        parts: list[str] = []
        known: list[int] = []
        for token in map(int, token_ids):
            if token < self._num_tokens:
                known.append(token)
                continue
            parts += [self._decode(known), "\ufffd"]
            known = []
        return "".join([*parts, self._decode(known)])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
