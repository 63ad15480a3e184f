"""Seeded sampling: its hash in torch (upstream it is a Triton kernel), and draws by token id.

Upstream a batch in which any request restricts its tokens (temperature 0 is top_k=1) draws those of
all requests by their rank, other batches by their id: which tokens a seed gives would depend on who
shares the batch. Delete `draw_by_id` when SGLang draws alike in both.
"""

from collections.abc import Callable
from typing import Any

import torch

_M = 0xFFFFFFFF


def _rotate_left(x: torch.Tensor, r: int) -> torch.Tensor:
    return ((x << r) | (x >> (32 - r))) & _M


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column): [N], [N], [V] integers -> [N, V] int64 < 2**32.

    The same bits as SGLang's Triton kernel (sglang.kernels.ops.sampling.murmur_hash).
    """
    s, p, c = (t.to(torch.int64) for t in (seed, positions, col_indices))
    h = torch.zeros(1, 1, dtype=torch.int64)
    for word in ((s & _M)[:, None], ((s >> 32) & _M)[:, None], (p & _M)[:, None], (c & _M)[None]):
        k = (_rotate_left((word * 0xCC9E2D51) & _M, 15) * 0x1B873593) & _M
        h = (_rotate_left(h ^ k, 13) * 5 + 0xE6546B64) & _M
    h = h ^ 16  # bytes hashed
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _M
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _M
    return h ^ (h >> 16)


def draw_by_id(
    original: Callable,
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    **options: Any,
) -> Any:
    """[N] ids drawn from [N, V] probabilities cut to each row's top_k and top_p; around SGLang's
    own, which keeps what has no seeds, or min_p, or asks for the probabilities as well."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    if sampling_seed is None or need_min_p_sampling or options.get("return_filtered_probs"):
        given = (probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)
        return original(*given, **options)
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    above = ordered.cumsum(-1) - ordered
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    cut = (ranks >= top_ks.view(-1, 1)) | ((above > top_ps.view(-1, 1)) & (top_ps.view(-1, 1) < 1))
    left = probs.masked_fill(torch.zeros_like(cut).scatter(1, ids, cut), 0.0)
    return multinomial_with_seed(left.log(), sampling_seed, positions).view(-1).to(torch.int32)
