"""SGLang 0.5.23's checksum of one tensor (`srt/managers/mm_utils.py`, tensor_hash), in torch.

It has two: SHA-256 for host memory, a Triton kernel for GPU memory. Both depend on the bytes only.
"""

import hashlib

import torch


def cpu_checksum(tensor: torch.Tensor) -> str:
    """SGLang's checksum of a tensor in host memory: 8 bytes of SHA-256 as 16 hex digits."""
    content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).digest()[:8].hex()


_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_TILE_WORDS = 8192
_SEED1 = 0x243F6A88
_SEED2 = ((_SEED1 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32
_TILES_AT_ONCE = 256


def _multiply(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2**32, for int64 tensors that hold 32-bit words."""
    low = x * (factor & 0xFFFF)  # < 2**48
    high = ((x * (factor >> 16)) & 0xFFFF) << 16
    return (low + high) & _MASK32


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser."""
    x = _multiply(x ^ (x >> 16), 0x85EBCA6B)
    x = _multiply(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK32


def _tile_sums(words: torch.Tensor, first: int, num_words: int) -> int:
    """Sum (modulo 2**64) of the tile hashes of `words`, which start at word `first`."""
    index = torch.arange(first, first + len(words), device=words.device) & _MASK32
    tiles = []
    for seed, factor, bits in ((_SEED1, 0x27D4EB2D, 15), (_SEED2, 0x165667B1, 13)):
        position = ((_multiply(index, factor) + seed) & _MASK32) ^ _rotate(index, bits)
        mixed = _mix(words ^ position)
        padding = -len(mixed) % _TILE_WORDS
        sums = torch.nn.functional.pad(mixed, (0, padding)).view(-1, _TILE_WORDS).sum(1) & _MASK32
        tiles.append(_mix(sums ^ (num_words * 4 & _MASK32)))
    high, low = (tile.tolist() for tile in tiles)
    return sum((h << 32) | lo for h, lo in zip(high, low, strict=True)) & _MASK64


def gpu_checksum(tensor: torch.Tensor) -> str:
    """SGLang's checksum of a tensor in GPU memory (its Triton kernel `gpu_tensor_hash`), in torch.

    Runs where `tensor` is. Tiles of 8192 32-bit words are hashed, summed, and the sum mixed.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    content = torch.nn.functional.pad(content, (0, -content.numel() % 4))
    words = content.view(torch.int32)
    total = 0
    step = _TILE_WORDS * _TILES_AT_ONCE
    for first in range(0, words.numel(), step):
        part = words[first : first + step].to(torch.int64) & _MASK32
        total = (total + _tile_sums(part, first, words.numel())) & _MASK64
    total ^= total >> 30
    total = total * 0xBF58476D1CE4E5B9 & _MASK64
    total ^= total >> 27
    total = total * 0x94D049BB133111EB & _MASK64
    total ^= total >> 31
    return f"{total if words.numel() else 0:016x}"
