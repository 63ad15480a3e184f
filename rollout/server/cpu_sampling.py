"""The seeded sampler's hash in torch: upstream it is a Triton kernel."""

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
