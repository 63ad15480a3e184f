"""What an update is told by: sums of each micro-batch, then figures of the global batch."""

import math
from typing import Any

import torch
import torch.distributed as dist

from framework.algorithm.ratio_quantiles import NUM_BINS, count_log_ratios, ratio_quantile
from framework.megatron.microbatch import Microbatch
from framework.megatron.parallel import Mesh

RATIOS = "ratios"
"""[NUM_BINS] float64: tokens by log pi / pi_engine, of one micro-batch."""
QUANTILES = (1, 50, 99)
"""In hundredths."""
OTHER_EXPERTS = "train/rollout_logprob_abs_diff_other_experts_mean"
"""Over the tokens that the trainer, left alone, would have given other experts (routing_replay)."""


def figures_of(
    batch: Microbatch,
    total: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    metrics: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Sums and maxima of one micro-batch, [] float32 each, and RATIOS."""
    mask = batch.loss_mask
    with torch.no_grad():
        difference = (logprobs - batch.rollout_logprobs).abs() * mask
        other = torch.zeros_like(mask) if batch.other_experts is None else batch.other_experts
        return {
            "loss": total.detach(),
            "tokens": mask.sum(),
            "entropy": (entropy * mask).sum(),
            "surprise": -(logprobs * mask).sum(),
            "rollout_surprise": -(batch.rollout_logprobs * mask).sum(),
            RATIOS: count_log_ratios(logprobs - batch.rollout_logprobs, mask),
            "rollout_diff": difference.sum(),
            "rollout_diff_max": largest(difference),
            "other_experts_diff": (difference * other).sum(),
            "other_experts_tokens": (mask * other).sum(),
            **{f"loss/{name}": (values * mask).sum() for name, values in metrics.items()},
        }


def largest(values: torch.Tensor) -> torch.Tensor:
    """The maximum, [] float; NaN counts as infinite, for gloo's MAX over ranks loses it."""
    return values.max().nan_to_num(nan=math.inf, posinf=math.inf)


def _perplexity(surprise: float) -> float:
    """exp of nats a token; a run that has left all bounds still has a number to log."""
    return math.exp(min(surprise, 700.0))


def reduce_figures(reports: list[dict[str, torch.Tensor]], mesh: Mesh) -> dict[str, float]:
    """Sum (or maximise) over micro-batches and ranks; the same result on every rank."""
    largest = torch.zeros(1)
    if mesh.reports:
        largest = torch.stack([each["rollout_diff_max"] for each in reports]).max()[None].cpu()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    ratios = torch.zeros(NUM_BINS, dtype=torch.float64)
    for each in reports:
        ratios += each.pop(RATIOS).cpu()
    dist.all_reduce(ratios if mesh.reports else ratios.zero_())
    totals = sum_figures(reports, mesh)
    tokens = max(1.0, totals["tokens"])
    figures = {
        "train/loss": totals["loss"],
        "train/tokens": totals["tokens"],
        "train/entropy": totals["entropy"] / tokens,
        "train/rollout_logprob_abs_diff_mean": totals["rollout_diff"] / tokens,
        "train/rollout_logprob_abs_diff_max": largest.item(),
        "train/perplexity": _perplexity(totals["surprise"] / tokens),
        "train/rollout_perplexity": _perplexity(totals["rollout_surprise"] / tokens),
        **{f"train/rollout_ratio_q{q:02d}": ratio_quantile(ratios, q / 100) for q in QUANTILES},
    }
    if rerouted := totals["other_experts_tokens"]:
        figures[OTHER_EXPERTS] = totals["other_experts_diff"] / rerouted
    for name, value in totals.items():
        if name.startswith("loss/"):
            figures[f"train/{name.removeprefix('loss/')}"] = value / tokens
    return figures


def sum_figures(reports: list[dict[str, torch.Tensor]], mesh: Mesh) -> dict[str, float]:
    """Every figure summed over micro-batches and reporting ranks; the same on every rank."""
    names: list[str] = sorted(reports[0]) if mesh.reports else []
    # Ranks that report nothing must still know the names: the last stage's first rank tells them.
    box: list[Any] = [names]
    source = mesh.layout.rank(pp=mesh.layout.pp - 1)
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    names = box[0]
    sums = torch.zeros(len(names), dtype=torch.float64)
    if mesh.reports:
        table = torch.stack([torch.stack([each[name] for name in names]) for each in reports])
        sums = table.double().sum(0).cpu()
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))
