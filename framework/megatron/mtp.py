"""Multi-token prediction (MTP) in the trainer: megatron-core's block and its loss, of heads alone.

    L = mtp_loss_scaling_factor / D * sum over depths k of the mean cross-entropy of token t_{i+1+k}
                                                                  (arXiv 2412.19437, eq. 24 and 25)

over tokens that the policy wrote, divided by their count in the whole step. The heads are detached
(`mtp_detach_heads`): what they learn from, hidden states, embedding and output layer, has no
gradient of this loss and clipping knows nothing of it, so the policy is trained as without them.
`model.megatron.mtp_detach_heads=false` lets it flow, as in pre-training.

Of the report: rows that pad the vocabulary count in the softmax, as in megatron-core's own losses.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from framework.megatron.microbatch import Microbatch
from framework.megatron.parallel import Mesh
from framework.megatron.torch_spec import TorchSpecProvider

MTP_SETTINGS = {"mtp_detach_heads": True}
"""TransformerConfig's fields for a model with MTP layers."""
_SUMS = ("loss_values", "correct_values", "total_values")


def mtp_block_spec(config: Any, spec: Any, vp_stage: int | None, *, te: bool) -> Any:
    """The MTP layers of a model chunk whose decoder is `spec`; None where it holds none."""
    if not config.mtp_num_layers:
        return None
    if te:
        return get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_mtp_block_spec_for_backend(
        config, spec, backend=TorchSpecProvider(), vp_stage=vp_stage
    )


class MtpLoss:
    """The scale and the figures of the MTP loss of one update."""

    def __init__(self, config: Any, optimizer: Any, mesh: Mesh) -> None:
        self._config, self._optimizer, self._mesh = config, optimizer, mesh
        self._microbatches = 0

    def begin(self, microbatches: Sequence[Microbatch]) -> None:
        """Before the passes of an update; a collective of the data-parallel ranks."""
        tokens = torch.stack([batch.loss_mask.sum() for batch in microbatches]).sum()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(tokens, group=group)
        # megatron-core adds up tokens, each micro-batch's as many as its labels.
        scale = self._optimizer.scale_loss(1 / tokens.clamp(min=1))
        self._config.mtp_grad_scale_func = lambda: scale
        self._microbatches = len(microbatches)
        MTPLossLoggingHelper.clean_metrics_in_tracker()

    def take_figures(self) -> dict[str, float]:
        """Of the update: the mean loss of its micro-batches, and how many of the tokens the heads
        would have had accepted. The same on every rank; a collective of all."""
        sums = torch.zeros(4, dtype=torch.float64)
        tracker = MTPLossLoggingHelper.tracker
        if self._mesh.reports and "loss_values" in tracker:
            sums[:3] = torch.stack([tracker[name].mean().cpu() for name in _SUMS])
            sums[3] = self._microbatches
        dist.all_reduce(sums)
        loss, correct, total, microbatches = sums.tolist()
        return {
            "train/mtp_loss": loss / max(1.0, microbatches),
            "train/mtp_accuracy": correct / max(1.0, total),
        }
