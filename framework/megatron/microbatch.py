"""Samples of a micro-batch as packed THD tensors, one row of T tokens, aligned for prediction.

Position t holds token t and everything about the *next* token of its sequence: its id is the label,
its log-prob is the output. So loss_mask, advantages and log-probs of a response token sit one
position before it, and the last position of each sequence has no label.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from framework.megatron.packing import zigzag_positions
from framework.megatron.parallel import Mesh
from framework.megatron.routes import RouteLayout, Routes
from rollout.types import Sample

COLUMNS = ("tokens", "labels")
"""Whole numbers."""
REAL_COLUMNS = (
    "loss_mask",
    "weights",
    "advantages",
    "rollout_logprobs",
    "staleness",
    "is_last",
    "turn_ends",
    "turn_rewards",
)
"""float32."""
TEACHER_COLUMNS = ("teacher_ids", "teacher_logprobs")
"""[k, T], whole numbers and float32."""


@dataclass(kw_only=True)
class Microbatch:
    """What one rank runs through the model at once; [T] = this rank's packed positions."""

    samples: list[int]
    """Indices into the step's batch, in packed order."""
    tokens: torch.Tensor
    """[T] int64."""
    labels: torch.Tensor
    """[T] int64: the next token of the same sequence; 0 where there is none."""
    position_ids: torch.Tensor
    """[T] int64, from 0 in each sequence."""
    sequence_ids: torch.Tensor
    """[T] int64: which sequence of the micro-batch, padding's own included."""
    num_sequences: int
    """The same on every context-parallel rank."""
    loss_mask: torch.Tensor
    """[T] float32: 1 where the label was written by the policy."""
    weights: torch.Tensor
    """[T] float32: loss_mask times the token's share of the global batch."""
    advantages: torch.Tensor
    """[T] float32."""
    rollout_logprobs: torch.Tensor
    """[T] float32."""
    staleness: torch.Tensor
    """[T] float32: versions between the token's policy and the step's."""
    is_last: torch.Tensor
    """[T] float32: 1 at the last token of a sequence."""
    turn_ends: torch.Tensor
    """[T] float32: 1 where the label is the last token of one of the policy's turns."""
    turn_rewards: torch.Tensor
    """[T] float32: there, what the environment paid for the turn, where the sample says so."""
    packed_seq_params: PackedSeqParams
    old_logprobs: torch.Tensor | None = None
    """[T] float32, on ranks of the last stage once computed."""
    ref_logprobs: torch.Tensor | None = None
    """The same of the reference policy."""
    selected: torch.Tensor | None = None
    """[T] float32: 1 at the tokens that the loss chose, see selection.py."""
    values: torch.Tensor | None = None
    """[T] float32: the critic's before the step's first update, where there is one."""
    returns: torch.Tensor | None = None
    """[T] float32: what the critic is to estimate."""
    teacher_ids: torch.Tensor | None = None
    """[k, T] int64: the teacher's likeliest tokens in place of the label, where the loss asks."""
    teacher_logprobs: torch.Tensor | None = None
    """[k, T] float32: its log-probs of them."""
    routes: Routes | None = None
    """The engine's, where the samples carry them, or the old policy's once recorded."""
    other_experts: torch.Tensor | None = None
    """[T] bool: where some router would by itself have chosen others than `routes`; on ranks that
    have all routers and see all of T (no stages, no sequence parallelism), after a pass."""


def pack_microbatch(
    indices: Sequence[int],
    samples: Mapping[int, Sample],
    advantages: Mapping[int, torch.Tensor],
    token_weight: Mapping[int, float],
    mesh: Mesh,
    sequence_parallel: bool,
    step: int = 0,
    teacher_top_k: int = 0,
    route_layout: RouteLayout | None = None,
    token_grain: int = 1,
) -> Microbatch:
    """Pack samples (by index into the step's batch) for one rank.

    Args:
        advantages: for each index [R] float32.
        token_weight: for each index the weight of one of its policy tokens in the global loss.
        step: the version that the policy has before it, for the tokens' staleness.
        teacher_top_k: how many of a teacher's tokens the loss asks for at each position.
        route_layout: what to make of the samples' routes; None: nothing.
        token_grain: a rank's share of the tokens is a multiple of it (`model.token_grain`).

    An empty `indices` gives a micro-batch of padding, so that all ranks run equally many.
    """
    cp = mesh.layout.cp
    multiple = 2 * cp if cp > 1 else 1
    rows = [_sequence(samples[i], advantages[i], token_weight[i], step) for i in indices]
    if teacher_top_k:
        for row, i in zip(rows, indices, strict=True):
            row |= teacher_columns(samples[i], teacher_top_k)
    wide = {name: (teacher_top_k,) for name in TEACHER_COLUMNS if teacher_top_k}
    columns, cu_seqlens = _end_to_end(rows, multiple, wide)
    # Sequence parallelism cuts each rank's tokens by tp; an empty micro-batch needs some as well.
    parts = mesh.layout.tp if sequence_parallel else 1
    whole = math.lcm(multiple * parts, cp * parts * token_grain)
    filler = -cu_seqlens[-1] % whole if cu_seqlens[-1] else whole
    if filler:
        for name, pieces in columns.items():
            dtype = torch.int64 if name in (*COLUMNS, "teacher_ids") else torch.float32
            pieces.append(torch.zeros((*wide.get(name, ()), filler), dtype=dtype))
        cu_seqlens.append(cu_seqlens[-1] + filler)
    packed = {name: torch.cat(pieces, dim=-1) for name, pieces in columns.items()}
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    sizes = starts.diff()
    packed["position_ids"] = torch.arange(cu_seqlens[-1]) - starts[:-1].repeat_interleave(sizes)
    packed["sequence_ids"] = torch.arange(len(sizes)).repeat_interleave(sizes)
    mine = None
    if cp > 1:
        mine = torch.tensor(zigzag_positions(cu_seqlens, cp, mesh.coords.cp))
        packed = {name: values[..., mine] for name, values in packed.items()}
    longest = int(sizes.max())
    starts = starts.to(mesh.device)
    routes = None
    if route_layout is not None:
        ours = [samples[i] for i in indices]
        routes = route_layout.pack(ours, cu_seqlens, mine, mesh, sequence_parallel)
    return Microbatch(
        samples=list(indices),
        num_sequences=len(sizes),
        routes=routes,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        **{name: values.to(mesh.device) for name, values in packed.items()},
    )


def _end_to_end(
    rows: Sequence[dict[str, torch.Tensor]], multiple: int, wide: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, list[torch.Tensor]], list[int]]:
    """Each column's pieces, padded to the multiple, and where sequences begin and end."""
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in (*COLUMNS, *REAL_COLUMNS, *wide)}
    cu_seqlens = [0]
    for row in rows:
        length = len(row["tokens"])
        padded = -(-length // multiple) * multiple
        for name, values in row.items():
            columns[name].append(torch.nn.functional.pad(values, (0, padded - length)))
        cu_seqlens.append(cu_seqlens[-1] + padded)
    return columns, cu_seqlens


def _sequence(
    sample: Sample, advantages: torch.Tensor, token_weight: float, step: int
) -> dict[str, torch.Tensor]:
    """One sample's columns, [P + R] each."""
    tokens = torch.from_numpy(sample.tokens.astype("int64"))
    length, first = len(tokens), sample.prompt_length - 1
    labels = torch.zeros(length, dtype=torch.int64)
    labels[:-1] = tokens[1:]

    def predicted(values: torch.Tensor) -> torch.Tensor:
        column = torch.zeros(length)
        column[first : length - 1] = values
        return column

    mask = torch.from_numpy(sample.loss_mask.astype("float32"))
    is_last = torch.zeros(length)
    is_last[-1] = 1
    ends, paid = _turns(sample)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": predicted(mask),
        "weights": predicted(mask * token_weight),
        "advantages": predicted(advantages * mask),
        "is_last": is_last,
        "staleness": predicted((step - torch.from_numpy(sample.versions.copy())) * mask),
        "turn_ends": predicted(torch.from_numpy(ends)),
        "turn_rewards": predicted(torch.from_numpy(paid)),
        "rollout_logprobs": predicted(torch.from_numpy(sample.rollout_logprobs.copy()) * mask),
    }


def teacher_columns(sample: Sample, k: int) -> dict[str, torch.Tensor]:
    """The teacher's k likeliest tokens where each token of a response is scored, [k, P + R] each.

    Raises:
        ValueError: the sample does not carry them.
    """
    ids, logprobs = sample.teacher_top_ids, sample.teacher_top_logprobs
    found = 0 if ids is None else ids.shape[1]
    if ids is None or logprobs is None or found != k:
        raise ValueError(
            f"sample {sample.group_id}/{sample.index} carries {found} of a teacher's likeliest "
            f"tokens, rollout.teacher_top_k={k}; it was generated with another value"
        )
    length, first = len(sample.tokens), sample.prompt_length - 1
    columns = {
        "teacher_ids": torch.zeros((k, length), dtype=torch.int64),
        "teacher_logprobs": torch.zeros((k, length)),
    }
    columns["teacher_ids"][:, first : length - 1] = torch.from_numpy(ids.T.astype("int64"))
    columns["teacher_logprobs"][:, first : length - 1] = torch.from_numpy(logprobs.T.copy())
    return columns


def _turns(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """[R] float32 each: 1 at the last token of each of the policy's turns, and its reward there."""
    ends, paid = np.zeros((2, sample.response_length), dtype=np.float32)
    written = sample.loss_mask.nonzero()[0]
    turns = np.searchsorted(sample.turn_starts, written, side="right")
    last = np.append(turns[1:] != turns[:-1], True)[: len(written)]
    ends[written[last]] = 1
    if sample.turn_rewards:
        rewards = np.array([0.0, *sample.turn_rewards], dtype=np.float32)
        paid[written[last]] = rewards[turns[last]]
    return ends, paid
