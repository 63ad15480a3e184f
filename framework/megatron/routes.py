"""Routes of a micro-batch: which experts compute this rank's tokens, layer by layer.

Sample.routes [N, layers * k] -> checked -> packed, cut as the tokens are -> {layer: [T', k]}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from framework.megatron.parallel import Mesh
from rollout.types import Sample

Routes = dict[int, torch.Tensor]
"""By megatron-core's layer number (from 1): [T', k] int16, the experts of each token that this
rank's router sees (T' = T, under sequence parallelism T / tp); OWN where it chooses itself."""
OWN = -1


@dataclass(frozen=True, kw_only=True)
class RouteLayout:
    """What one rank needs of the routes."""

    layers: tuple[int, ...]
    """Numbers (from 1) of its layers with a router."""
    num_layers: int
    """Of the whole model, those without experts included."""
    top_k: int
    num_experts: int
    required: bool
    """Samples must have routes (algorithm.routing_replay=rollout)."""

    def of_sample(self, sample: Sample) -> torch.Tensor | None:
        """[N, len(layers), k] int16; None where the sample trains nothing, or need not have any.

        Raises:
            ValueError: they are missing, or not those of this model; names the sample.
        """
        where = f"sample {sample.group_id}/{sample.index}"
        if sample.routes is None:
            if self.required and sample.loss_mask.any():
                raise ValueError(
                    f"{where} has no routes, which algorithm.routing_replay=rollout replays; they "
                    "come with rollout.engine.return_routes=true"
                )
            return None
        width = self.num_layers * self.top_k
        if sample.routes.shape[1] != width:
            raise ValueError(
                f"{where}: routes of {sample.routes.shape[1]} ids a token; {self.num_layers} "
                f"layers of {self.top_k} experts a token make {width}"
            )
        whole = torch.from_numpy(sample.routes.astype("int16"))
        mine = whole.unflatten(1, (self.num_layers, self.top_k))[:, [n - 1 for n in self.layers]]
        ordered = mine.sort(-1).values
        twice = (ordered.diff(dim=-1) == 0).any(-1)
        beyond = (ordered[..., -1] >= self.num_experts) | (ordered[..., 0] < 0)
        for what, wrong in (("an expert twice", twice), ("an expert that is not there", beyond)):
            if wrong.any():
                token, layer = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{where}: routes name {what}: {mine[token, layer].tolist()} of "
                    f"{self.num_experts} for token {token} in layer {self.layers[layer] - 1}"
                )
        return mine

    def pack(
        self,
        samples: Sequence[Sample],
        cu_seqlens: Sequence[int],
        mine: torch.Tensor | None,
        mesh: Mesh,
        sequence_parallel: bool,
    ) -> Routes | None:
        """Of a micro-batch whose k-th sequence, from position cu_seqlens[k] on, is samples[k].

        Args:
            mine: [T] the packed positions that this context-parallel rank holds; None: all.

        Returns None where no sample has routes.
        """
        found = [self.of_sample(sample) for sample in samples]
        if all(each is None for each in found):
            return None
        packed = torch.full((cu_seqlens[-1], len(self.layers), self.top_k), OWN, dtype=torch.int16)
        for start, each in zip(cu_seqlens, found, strict=False):
            if each is not None:
                packed[start : start + len(each)] = each
        if mine is not None:
            packed = packed[mine]
        if sequence_parallel:  # routers see their rank's part of the sequence
            packed = packed.chunk(mesh.layout.tp)[mesh.coords.tp]
        packed = packed.to(mesh.device)
        return {number: packed[:, at] for at, number in enumerate(self.layers)}
