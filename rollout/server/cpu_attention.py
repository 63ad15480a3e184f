"""Batched attention for SGLang's torch_native backend: fast, and the same bits in any batch.

Upstream loops over sequences in Python, once per layer and token. Here all sequences whose query
lies in the same block of BLOCK positions are computed together. A query at position p attends to
the keys of its own and earlier blocks, the later ones masked, so the shapes a query meets depend
on p alone: not on the batch, not on how its prompt was cut into chunks, and not on whether it is
computed at prefill or at decode. Queries are filled up to `attention_rows` rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rollout.server import cpu_invariant

BLOCK = 32
"""Positions whose queries share one number of keys."""

_MAX_KEY_ELEMENTS = 1 << 24
"""Bound of the keys gathered at a time (64 MiB in fp32); results do not depend on it."""


@dataclass(kw_only=True, slots=True)
class QueryBlocks:
    """Runs of consecutive queries of one sequence within one block; n of them."""

    sequence: torch.Tensor
    """[n] row of req_to_token."""
    first_row: torch.Tensor
    """[n] row of the query tensor at which the run begins."""
    position: torch.Tensor
    """[n] position of that query in its sequence."""
    count: torch.Tensor
    """[n] queries in the run."""

    def select(self, chosen: torch.Tensor) -> "QueryBlocks":
        """Some of the runs."""
        return QueryBlocks(
            sequence=self.sequence[chosen],
            first_row=self.first_row[chosen],
            position=self.position[chosen],
            count=self.count[chosen],
        )


def decode_blocks(req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> QueryBlocks:
    """One query per sequence, its last token."""
    num_sequences = len(seq_lens)
    return QueryBlocks(
        sequence=req_pool_indices,
        first_row=torch.arange(num_sequences),
        position=seq_lens.to(torch.int64) - 1,
        count=torch.ones(num_sequences, dtype=torch.int64),
    )


def extend_blocks(
    req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor, extend_lens: torch.Tensor
) -> QueryBlocks:
    """The new tokens of every sequence, cut where a block of positions ends."""
    runs: list[tuple[int, int, int, int]] = []
    row = 0
    for sequence, prefix, length in zip(
        req_pool_indices.tolist(), prefix_lens.tolist(), extend_lens.tolist(), strict=True
    ):
        position, end = prefix, prefix + length
        while position < end:
            count = min(end, (position // BLOCK + 1) * BLOCK) - position
            runs.append((sequence, row, position, count))
            row += count
            position += count
    columns = torch.tensor(runs, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return QueryBlocks(
        sequence=columns[0], first_row=columns[1], position=columns[2], count=columns[3]
    )


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    blocks: QueryBlocks,
    scaling: float | None,
) -> None:
    """Causal attention of query [T, heads, d] over the cache, into output [T, heads, dv].

    k_cache [slots, kv_heads, d], v_cache [slots, kv_heads, dv], req_to_token [sequences, context].
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    block_index = blocks.position // BLOCK
    for index in sorted(set(block_index.tolist())):
        num_keys = (index + 1) * BLOCK
        per_run = num_keys * k_cache.shape[1] * (k_cache.shape[2] + v_cache.shape[2])
        chosen = (block_index == index).nonzero().squeeze(1)
        for piece in chosen.split(max(1, _MAX_KEY_ELEMENTS // per_run)):
            _attend_runs(
                query,
                output,
                (k_cache, v_cache),
                req_to_token,
                blocks.select(piece),
                num_keys,
                scale,
            )


def _attend_runs(
    query: torch.Tensor,
    output: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    req_to_token: torch.Tensor,
    runs: QueryBlocks,
    num_keys: int,
    scale: float,
) -> None:
    """Runs that lie in the same block: n of them, padded to m queries each."""
    k_cache, v_cache = caches
    num_runs, num_heads, num_kv_heads = len(runs.count), query.shape[1], k_cache.shape[1]
    offsets = torch.arange(int(runs.count.max()))
    in_run = offsets < runs.count[:, None]  # [n, m]
    rows = runs.first_row[:, None] + torch.where(in_run, offsets, 0)  # [n, m]
    slots = _key_slots(req_to_token, runs, num_keys)  # [n, keys]

    # Heads that share a key head become rows of one product: [n * kv_heads, m * group, d].
    queries = query[rows].unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    queries = queries.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).float()
    keys = _gather(k_cache, slots)  # [n * kv_heads, keys, d]
    values = _gather(v_cache, slots)
    least_rows = _least_rows(keys.shape[2], values.shape[2], num_keys)
    scores = _product(queries, keys.transpose(1, 2), least_rows) * scale

    visible = torch.arange(num_keys) <= (runs.position[:, None] + offsets)[..., None]  # [n, m, k]
    scores = scores.view(num_runs, num_kv_heads, len(offsets), -1, num_keys)
    scores = scores.masked_fill(~visible[:, None, :, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).flatten(2, 3).flatten(0, 1)
    result = _product(weights, values, least_rows)

    result = result.view(num_runs, num_kv_heads, len(offsets), -1, values.shape[2])
    result = result.permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, m, heads, dv]
    output[rows[in_run]] = result[in_run].to(output.dtype)


def _key_slots(req_to_token: torch.Tensor, runs: QueryBlocks, num_keys: int) -> torch.Tensor:
    """[n, keys] cache slots; keys that no query of the run sees read the sequence's first slot.

    Those are masked, but what is read must be a number, and an unwritten slot may hold NaN.
    """
    width = min(num_keys, req_to_token.shape[1])
    slots = req_to_token[runs.sequence, :width].to(torch.int64)
    slots = torch.nn.functional.pad(slots, (0, num_keys - width))
    seen = torch.arange(num_keys) < (runs.position + runs.count)[:, None]
    return torch.where(seen, slots, slots[:, :1])


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Cache [slots, kv_heads, d] at [n, keys] -> [n * kv_heads, keys, d] float32."""
    num_kv_heads, size = cache.shape[1:]
    heads = torch.arange(num_kv_heads)[:, None]
    rows = (slots[:, None] * num_kv_heads + heads).flatten()
    # Whole rows of d, already in their final order: one pass over memory, no transposed copy.
    gathered = cache.view(-1, size).index_select(0, rows)
    return gathered.view(-1, slots.shape[1], size).float()


def _least_rows(key_size: int, value_size: int, num_keys: int) -> int:
    if not cpu_invariant.enabled():
        return 1
    return max(cpu_invariant.attention_rows(size, num_keys) for size in (key_size, value_size))


def _product(left: torch.Tensor, right: torch.Tensor, least_rows: int) -> torch.Tensor:
    """bmm with at least `least_rows` rows on the left."""
    num_rows = left.shape[1]
    if num_rows < least_rows:
        left = torch.nn.functional.pad(left, (0, 0, 0, least_rows - num_rows))
    return torch.bmm(left, right)[:, :num_rows]


def run_decode(
    original: Callable,
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Around TorchNativeAttnBackend._run_sdpa_forward_decode (its causal=False: one query)."""
    arguments = (query, output, k_cache, v_cache, req_to_token, req_pool_indices)
    if not _is_plain(encoder_lens, options):
        return original(backend, *arguments, seq_lens, encoder_lens, **options)
    blocks = decode_blocks(req_pool_indices, seq_lens)
    attend(*arguments[:5], blocks, options["scaling"])
    return output


def run_extend(
    original: Callable,
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Around TorchNativeAttnBackend._run_sdpa_forward_extend."""
    arguments = (query, output, k_cache, v_cache, req_to_token, req_pool_indices)
    lengths = (extend_prefix_lens, extend_seq_lens)
    if not options["causal"] or not _is_plain(encoder_lens, options):
        return original(backend, *arguments, seq_lens, *lengths, encoder_lens, **options)
    attend(*arguments[:5], extend_blocks(req_pool_indices, *lengths), options["scaling"])
    return output


def _is_plain(encoder_lens: torch.Tensor | None, options: dict[str, Any]) -> bool:
    """Self-attention over everything before: no encoder, no window."""
    window = options.get("sliding_window_size")
    return encoder_lens is None and not options.get("is_cross_attn") and window is None
