"""Which experts the engine computed each token with: `rollout.engine.return_routes`.

Routes are [N, layers * k] ids of experts, the k of a token in every layer side by side (in a layer
without experts they mean nothing), of the first N tokens of a sample in the smallest type that
holds them. The token sampled last has none: nobody has computed with it yet. Trainers repeat the
choices (arXiv 2510.11370; framework/megatron/routing_replay.py).
"""

import base64
import binascii

import numpy as np

ROUTE_DTYPES = ("uint8", "uint16")


def read_routes(encoded: str | None, num_tokens: int) -> np.ndarray:
    """[num_tokens, layers * k] from SGLang's `routed_experts`: base64 of [tokens, layers, k] int32.

    Raises:
        ValueError: there are none, or not as many as tokens.
    """
    if encoded is None:
        raise ValueError(
            "it holds no routed_experts: the engine must serve a mixture of experts with "
            "--enable-return-routed-experts (rollout.engine.return_routes)"
        )
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"routed_experts are not base64: {error}") from None
    width, rest = divmod(len(data), 4 * num_tokens) if num_tokens else (0, len(data))
    if rest or not width:
        raise ValueError(
            f"routed_experts of {len(data)} bytes are not those of {num_tokens} tokens"
        )
    return _narrow(np.frombuffer(data, dtype="<i4").reshape(num_tokens, width))


def _narrow(routes: np.ndarray) -> np.ndarray:
    """The same ids in the smallest type."""
    low, high = int(routes.min()), int(routes.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ValueError(f"routed_experts has ids from {low} to {high}, which no model has")
    return routes.astype(np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16)
