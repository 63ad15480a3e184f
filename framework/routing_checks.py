"""What routing replay needs of the model, the engine and the rest of the algorithm."""

from collections.abc import Iterator

from framework.config import RunConfig
from framework.model_shape import ModelShape

OWN_WAYS = ("sinkhorn", "quantile_balancing")
"""Values of moe_router_load_balancing_type whose choices megatron-core does not let us replace."""


def routing_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything about routes that cannot work."""
    replay, engine = config.algorithm.routing_replay, config.rollout.engine
    if engine.return_routes and not shape.num_experts:
        yield f"rollout.engine.return_routes=True: {_dense(shape)}; must be false"
    if engine.return_routes and engine.router:
        yield (
            "rollout.engine.return_routes=True: sglang-router (0.3.2) passes on only the fields of "
            "requests that it knows, not return_routed_experts: engines would return no routes; "
            "set rollout.engine.router=false: calls are dealt out without it too"
        )
    if replay == "none" or config.mode == "eval":
        return
    key = f"algorithm.routing_replay={replay}"
    if not shape.num_experts:
        yield f"{key}: {_dense(shape)}; must be none"
        return
    if config.stage != "rl":
        yield f"{key}: stage={config.stage} samples nothing; must be none"
        return
    if replay == "rollout" and config.mode != "train_only" and not engine.return_routes:
        yield (
            f"rollout.engine.return_routes=False: with {key} samples carry the engine's routes; "
            "set true"
        )
    if replay == "old_policy" and config.algorithm.old_logprobs != "trainer":
        yield (
            f"algorithm.old_logprobs={config.algorithm.old_logprobs}: saves the pass whose routes "
            f"{key} replays; must be trainer"
        )
    yield from _megatron(config, key)


def _dense(shape: ModelShape) -> str:
    return f"{shape.architecture} has no experts that tokens could be routed to"


def _megatron(config: RunConfig, key: str) -> Iterator[str]:
    fields = config.model.megatron
    if fields.get("moe_router_fusion"):
        yield f"model.megatron.moe_router_fusion=True: the fused router replays nothing ({key})"
    named = fields.get("moe_router_load_balancing_type", "")
    found = set(named if isinstance(named, list) else [named]) & set(OWN_WAYS)
    if found:
        yield (
            f"model.megatron.moe_router_load_balancing_type={named}: such a router replays nothing "
            f"({key})"
        )
