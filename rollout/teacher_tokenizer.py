"""Whether a teacher's server reads token ids as the policy's tokenizer does."""

import logging
from collections.abc import Sequence

import aiohttp
import msgspec
import numpy as np

from rollout.tokens import Chat

logger = logging.getLogger(__name__)

NUM_PROBES = 256
TIMEOUT_S = 30.0
MAX_REPLY_BYTES = 1 << 20
"""4 KiB for the text of each token."""


class _Texts(msgspec.Struct):
    text: list[str | None]


_decode_texts = msgspec.json.Decoder(_Texts).decode


def probe_ids(num_tokens: int) -> list[int]:
    """Token ids spread over the vocabulary, its first and last among them."""
    return np.unique(np.linspace(0, num_tokens - 1, NUM_PROBES).astype(int)).tolist()


def first_difference(
    ids: Sequence[int], theirs: Sequence[str | None], ours: Sequence[str]
) -> str | None:
    """What is said of the first token that is another text there; None: all are the same.

    White space is left out: whether a lone token keeps its own depends on settings of decoding.
    """
    for token, there, here in zip(ids, theirs, ours, strict=True):
        if "".join((there or "").split()) != "".join(here.split()):
            return f"token {token} is {there!r} there and {here!r} here"
    return None


async def check_tokenizer(what: str, url: str, api_key: str, chat: Chat) -> None:
    """Ask the server for the texts of some of the policy's tokens; a server that does not tell is
    left with a warning.

    Raises:
        ValueError: they are other texts; one line that begins with `what`.
    """
    ids = probe_ids(chat.num_tokens)
    body = {"tokens": [[token] for token in ids], "skip_special_tokens": False}
    headers = {"Authorization": f"Bearer {api_key}"}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.post(f"{url}/v1/detokenize", json=body) as reply,
        ):
            status, data = reply.status, bytearray()
            async for chunk in reply.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    raise ValueError(f"its reply exceeds {MAX_REPLY_BYTES} bytes")
        if status != 200:
            said = " ".join(data[:200].decode(errors="replace").split())
            raise ValueError(f"status {status}: {said}")
        theirs = _decode_texts(data).text
        if len(theirs) != len(ids):
            raise ValueError(f"{len(theirs)} texts of {len(ids)} tokens")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # msgspec's are ValueErrors
        why = str(error) or type(error).__name__
        logger.warning("%s: its tokenizer was not compared with the policy's: %s", what, why)
        return
    if found := first_difference(ids, theirs, [chat.text([token]) for token in ids]):
        raise ValueError(f"{what}: its tokenizer is not the policy's: {found}")
