"""The gate before the first update: trainer and engine must agree on what the engine sampled."""

import torch
import torch.distributed as dist

from framework.config import RunConfig
from framework.megatron.figures import largest
from framework.megatron.microbatch import Microbatch
from framework.megatron.parallel import Mesh


class GateError(RuntimeError):
    """Trainer and engine disagree on the log-probs of what the engine sampled."""


def gate_bound(config: RunConfig) -> str:
    """The field of `gate` that bounds how far trainer and engine may be apart."""
    if config.weight_sync.quantization != "none":
        return "logprob_abs_diff_max_quantized"
    exact = {config.model.dtype, config.rollout.engine.dtype} == {"float32"}
    return "logprob_abs_diff_max" if exact else "logprob_abs_diff_max_bf16"


def check_gate(
    updates: list[list[Microbatch]], mesh: Mesh, config: RunConfig, start_step: int
) -> None:
    """Compare trainer and engine log-probs on the first batch; all ranks decide alike.

    Args:
        updates: this rank's micro-batches, with the trainer's old_logprobs on reporting ranks.
        start_step: steps trained before this batch.

    Raises:
        GateError: they differ by more than the bound of the model's dtype.
    """
    worst = torch.zeros(1)
    if mesh.reports:
        for batch in (each for microbatches in updates for each in microbatches):
            assert batch.old_logprobs is not None
            difference = (batch.old_logprobs - batch.rollout_logprobs).abs() * batch.loss_mask
            worst = torch.maximum(worst, largest(difference).cpu())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    key = gate_bound(config)
    bound = getattr(config.gate, key)
    if not worst.item() <= bound:
        raise GateError(
            f"step {start_step}: trainer and engine log-probs differ by up to "
            f"{worst.item():.3g} on the sampled tokens; gate.{key}={bound:g}. "
            "Do both hold the same model and weights?"
        )
