"""Routing replay: which experts compute a token is taken from elsewhere, what they weigh is not.

algorithm.routing_replay

    old_policy  R2, "routing replay" of arXiv 2507.18071: the choices of the trainer's own pass
                before the updates of a batch
    rollout     R3, arXiv 2510.11370: the engine's choices, which came with the samples

Gates are those of the current weights over the replayed experts, so routers have their gradient.

`TopKRouter.router_replay` is where megatron-core asks. Its own RouterReplay has one choice a router
at a time, and a switch between forward and backward that its pipeline schedules do not throw: under
them a micro-batch would get another one's. Ours goes by the micro-batch that is being computed; a
backward pass that computes layers again meets micro-batches in the order of their forward passes.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from framework.megatron.microbatch import Microbatch
from framework.megatron.model import Policy
from framework.megatron.routes import RouteLayout

TopK = tuple[torch.Tensor, torch.Tensor]
"""Scores and ids of the chosen experts, [T', k] each."""


class Routing(Enum):
    """What routers do during a pass."""

    OWN = "own"
    """Choose."""
    RECORD = "record"
    """Choose, and leave the choice in the micro-batch."""
    COMPARE = "compare"
    """Choose, and count where the micro-batch's routes are others."""
    REPLAY = "replay"
    """Take the micro-batch's routes."""


class RoutingReplay:
    """The routers of one rank's policy, and what they are to do."""

    def __init__(self, policy: Policy, replay: str) -> None:
        """replay: algorithm.routing_replay."""
        config = policy.config
        assert config.num_moe_experts is not None
        self.replay = replay
        self.routing = Routing.OWN
        self.batch: Microbatch | None = None
        """The one that a forward pass is computing."""
        self._layers = [_Layer(self, module) for module in _routers(policy)]
        self._whole = config.pipeline_model_parallel_size == 1 and not config.sequence_parallel
        self._counts = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
        self.layout = RouteLayout(
            layers=tuple(layer.number for layer in self._layers),
            num_layers=config.num_layers,
            top_k=config.moe_router_topk,
            num_experts=config.num_moe_experts,
            required=replay == "rollout",
        )

    def scores(self) -> Routing:
        """During the trainer's own pass over a batch, before its updates."""
        return {"old_policy": Routing.RECORD, "rollout": Routing.REPLAY}.get(
            self.replay, Routing.OWN
        )

    def updates(self) -> Routing:
        """During an update."""
        return Routing.COMPARE if self.replay == "none" else Routing.REPLAY

    @contextlib.contextmanager
    def during(self, routing: Routing) -> Iterator[None]:
        """Around the passes over some micro-batches.

        Raises:
            RuntimeError: a router did not ask for its routes.
        """
        self.routing = routing
        self._counts.zero_()
        for layer in self._layers:
            layer.begin()
        try:
            yield
        finally:
            self.routing = Routing.OWN
        silent = [layer.number for layer in self._layers if not layer.asked]
        if routing is Routing.REPLAY and silent:
            raise RuntimeError(
                f"the routers of layers {silent} asked for no routes: under this configuration "
                "(model.megatron) megatron-core does not replay any"
            )

    @contextlib.contextmanager
    def forward(self, batch: Microbatch) -> Iterator[None]:
        """Around the model's forward pass."""
        self.batch = batch
        batch.other_experts = None
        try:
            yield
        finally:
            self.batch = None

    def count(self, batch: Microbatch, differ: torch.Tensor, known: torch.Tensor) -> None:
        """[T'] bool each: tokens with other experts than the router's own choice, of the known."""
        found = differ & known
        self._counts += torch.stack([found.sum(), known.sum()])
        if self._whole:
            before = batch.other_experts
            batch.other_experts = found if before is None else found | before

    def take_figures(self) -> dict[str, float]:
        """Of the passes last gone `during`; the same on every rank, empty if no token had routes.

        Collective.
        """
        counts = self._counts.clone().cpu()
        dist.all_reduce(counts)
        differ, known = counts.tolist()
        return {"train/other_experts_fraction": differ / known} if known else {}


class _Layer:
    """In the place of megatron-core's RouterReplay, for one router."""

    def __init__(self, of: RoutingReplay, router: TopKRouter) -> None:
        assert router.layer_number is not None
        self.number = router.layer_number
        self.asked = False
        self._of = of
        self._again: deque[torch.Tensor | None] = deque()
        """What backward passes may want, in the order of the forward passes; None: own choices."""
        router.router_replay = self  # pyright: ignore[reportAttributeAccessIssue]  # by its methods

    def begin(self) -> None:
        """Before the passes over some micro-batches."""
        self.asked = False
        self._again.clear()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., TopK] | None = None,
    ) -> TopK:
        """The experts of every token and their scores, from scores [T', E]."""
        assert default_compute_topk is not None
        self.asked = True
        own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        of, batch = self._of, self._of.batch
        if of.routing is Routing.OWN:
            return own
        if batch is None:  # the backward pass computes the layer again
            return _take(scores, own, self._again.popleft() if self._again else None)
        if of.routing is Routing.RECORD:
            if batch.routes is None:
                batch.routes = {}
            batch.routes[self.number] = own[1].to(torch.int16)
            return own
        if of.routing is Routing.REPLAY:
            self._again.append(None if batch.routes is None else batch.routes[self.number])
        if batch.routes is None:  # padding, or samples that carry none and need not
            assert of.replay != "old_policy", "no pass has recorded what is to be replayed"
            return own
        routes = batch.routes[self.number]
        known = routes[:, 0] >= 0
        ordered = (ids.sort(-1).values for ids in (own[1].to(torch.int16), routes))
        of.count(batch, torch.ne(*ordered).any(-1), known)
        if of.routing is Routing.COMPARE:
            return own
        return _take(scores, own, routes)


def _take(scores: torch.Tensor, own: TopK, routes: torch.Tensor | None) -> TopK:
    """As a router would choose if these were the best: where they are, to the same bits."""
    if routes is None:
        return own
    ids = torch.where(routes >= 0, routes.long(), own[1])
    found, order = scores.gather(1, ids).topk(ids.size(1), dim=1, sorted=torch.is_grad_enabled())
    return found, ids.gather(1, order)


def _routers(policy: Policy) -> Sequence[Any]:
    found = [each for chunk in policy.chunks for each in chunk.modules()]
    # The engine's routes, and the old policy's, are of the decoder's layers only.
    return [each for each in found if isinstance(each, TopKRouter) and not each.is_mtp_layer]
