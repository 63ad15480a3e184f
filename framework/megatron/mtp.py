"""Multi-token prediction (MTP) in the trainer: megatron-core's block and its loss, of heads alone.

    L = mtp_loss_scaling_factor / D * sum over depths k of the mean cross-entropy of token t_{i+1+k}
                                                                  (arXiv 2412.19437, eq. 24 and 25)

over tokens that the policy wrote, divided by their count in the whole update. The heads are
detached (`mtp_detach_heads`): what they learn from, hidden states, embedding and output layer, has
no gradient of this loss, and they are clipped by a norm of their own at optimizer.clip_grad, so the
policy is trained as without them. `model.megatron.mtp_detach_heads=false` lets it flow, as in
pre-training.

megatron-core's own loss gives probability to the rows that pad the vocabulary and weighs tokens by
counts of their micro-batch; ours does neither, so that every layout trains alike. For that it
relies on the order in which megatron-core's `process_mtp_loss` rolls, asks for the loss of a depth
and weighs it, which is that of one version.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.transformer.multi_token_prediction import roll_tensor

from framework.megatron.cpu import MEGATRON_VERSION
from framework.megatron.logprobs import vocab_parallel_logprobs
from framework.megatron.microbatch import Microbatch
from framework.megatron.parallel import Mesh
from framework.megatron.torch_spec import TorchSpecProvider

MTP_SETTINGS = {"mtp_detach_heads": True}
"""TransformerConfig's fields for a model with MTP layers."""


def mtp_block_spec(config: Any, spec: Any, vp_stage: int | None, *, te: bool) -> Any:
    """The MTP layers of a model chunk whose decoder is `spec`; None where it holds none."""
    if not config.mtp_num_layers:
        return None
    if te:
        return get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_mtp_block_spec_for_backend(
        config, spec, backend=TorchSpecProvider(), vp_stage=vp_stage
    )


def check_megatron() -> None:
    """RuntimeError where the loss would meet another megatron-core than the one it is proven on."""
    found = importlib.metadata.version("megatron-core")
    if found != MEGATRON_VERSION:
        raise RuntimeError(
            f"model.mtp=true: megatron-core {found} is installed; the loss of multi-token "
            f"prediction is proven for {MEGATRON_VERSION} only: install "
            f"megatron-core=={MEGATRON_VERSION} or set model.mtp=false"
        )


class MtpModel(GPTModel):
    """GPTModel with the MTP loss that this module describes."""

    def __init__(self, *arguments: Any, real_vocab_size: int, **keywords: Any) -> None:
        check_megatron()
        super().__init__(*arguments, **keywords)
        self.real_vocab_size = real_vocab_size
        self.mtp_masks: torch.Tensor | None = None
        """[2, T]: what counts of the labels at the depth before, and where there is a label."""
        self.mtp_packed: Any = None
        self.mtp_sums: torch.Tensor | None = None
        """[3] float64 over depths and micro-batches: loss, tokens guessed right, tokens."""

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Called for each depth in turn: cross-entropy [1, T] of labels [1, T] from logits
        [T, 1, V / tp], weighted so that megatron-core's own weights drop out."""
        if self.mtp_masks is None or not torch.is_grad_enabled():
            return torch.zeros(labels.shape, device=logits.device)
        groups: Any = self.pg_collection
        rolled: Any = roll_tensor(
            self.mtp_masks, cp_group=groups.cp, packed_seq_params=self.mtp_packed
        )
        self.mtp_masks = masks = rolled[0]
        found = vocab_parallel_logprobs(
            logits[:, 0], labels[0], self.real_vocab_size, self.tp_group
        )
        loss = -found[0] * masks[0]
        right = is_likeliest(logits[:, 0], labels[0], self.real_vocab_size, self.tp_group)
        sums = torch.stack([loss.detach().sum(), (right * masks[0]).sum(), masks[0].sum()])
        self.mtp_sums = sums.double() + (0 if self.mtp_sums is None else self.mtp_sums)
        # It will multiply by all tokens over those that have a label.
        return (loss * (masks[1].sum().clamp(min=1) / masks[1].numel()))[None]


@torch.no_grad()
def is_likeliest(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp_group: Any
) -> torch.Tensor:
    """[T] bool: no token has a larger logit, of [T, V / tp], than the label has."""
    columns = logits.size(-1)
    start = tp_group.rank() * columns
    real = torch.arange(start, start + columns, device=logits.device) < vocab_size
    logits = logits.detach().float().where(real, -torch.inf)
    index = labels - start
    here = (index >= 0) & (index < columns)
    own = logits.gather(-1, index.where(here, 0)[:, None])[:, 0].where(here, -torch.inf)
    both = torch.stack([own, logits.amax(-1)])
    if tp_group.size() > 1:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=tp_group)
    return both[0] >= both[1]


class MtpLoss:
    """The scale and the figures of the MTP loss of a policy's updates."""

    def __init__(self, policy: Any, mesh: Mesh) -> None:
        self._config, self._optimizer = policy.config, policy.optimizer
        self._models: list[MtpModel] = policy.chunks
        self._mesh = mesh

    def begin(self, microbatches: Sequence[Microbatch]) -> None:
        """Before the passes of an update; a collective of the data-parallel ranks."""
        tokens = torch.stack([self._mask(batch).sum() for batch in microbatches]).sum()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(tokens, group=group)
        scale = self._optimizer.scale_loss(1 / tokens.clamp(min=1))
        self._config.mtp_grad_scale_func = lambda: scale
        for model in self._models:
            model.mtp_sums = None

    def forward(self, batch: Microbatch) -> None:
        """Before the model's forward pass over a micro-batch."""
        mask = self._mask(batch)
        for model in self._models:
            model.mtp_masks = torch.stack([mask, torch.ones_like(mask)])
            model.mtp_packed = batch.packed_seq_params

    def _mask(self, batch: Microbatch) -> torch.Tensor:
        """[T]: the policy's tokens, but for the first of a sequence, which not every depth
        predicts: so all depths have as many."""
        return batch.loss_mask * (batch.position_ids >= self._config.mtp_num_layers)

    def take_figures(self) -> dict[str, float]:
        """Of the update: the mean loss of a token, and how many of the tokens the heads would have
        had accepted. The same on every rank; a collective of all."""
        sums = torch.zeros(3, dtype=torch.float64)
        found = self._models[-1].mtp_sums
        if self._mesh.reports and found is not None:
            sums += found.cpu()
        dist.all_reduce(sums)
        loss, right, tokens = sums.tolist()
        return {
            "train/mtp_loss": loss / max(1.0, tokens),
            "train/mtp_accuracy": right / max(1.0, tokens),
        }
