"""What is allowed and yet seldom meant: said before a run starts, never refused."""

from collections.abc import Iterator
from pathlib import Path

from framework.config import RunConfig
from framework.lora_checks import uses_lora
from framework.model_shape import read_model_shape

TINY_HIDDEN_SIZE = 512
"""Models narrower than this bear learning rates that would wreck a real one."""
USUAL_LR = 1e-5
ADAPTERS_LR = 10
"""Adapters bear a rate that many times the whole model's."""


def config_notes(config: RunConfig) -> Iterator[str]:
    """One line each, for a configuration that `checks` has accepted."""
    taken = Path(config.run_dir, "config.yaml").exists()
    if config.dry_run and taken and config.checkpoint.resume != "auto":
        yield (
            f"run_dir={config.run_dir}: already holds a run, which is refused without dry_run; "
            "choose name=, or go on with it by checkpoint.resume=auto"
        )
    if config.stage != "rl" or config.mode not in ("train", "train_only"):
        return
    staleness = config.rollout.max_staleness_steps
    if staleness and config.algorithm.correction == "none":
        yield (
            f"rollout.max_staleness_steps={staleness} with algorithm.correction=none: samples of "
            "older policies are trained as if they were this one's; algorithm=decoupled_ppo or "
            "algorithm.correction=token corrects for it"
        )
    if config.weight_sync.quantization != "none" and config.algorithm.correction == "none":
        yield (
            f"weight_sync.quantization={config.weight_sync.quantization} with "
            "algorithm.correction=none: samples of the rounded policy are trained as if they were "
            "the trainer's own; algorithm=tis corrects for it"
        )
    replay = config.algorithm.routing_replay
    if replay == "old_policy" and config.algorithm.updates_per_step == 1:
        yield (
            "algorithm.routing_replay=old_policy with algorithm.updates_per_step=1: before its "
            "only update the policy is the old policy, and their routes are the same"
        )
    if replay == "rollout" and staleness and config.weight_sync.pause_mode == "retract":
        yield (
            "algorithm.routing_replay=rollout with weight_sync.pause_mode=retract: an answer that "
            "a weight update interrupts is computed anew, and has the routes of that"
        )
    lr, times, what = config.optimizer.lr, 1, ""
    if uses_lora(config):
        times, what = ADAPTERS_LR, " of adapters"
    if lr > times * USUAL_LR and read_model_shape(config.model).hidden_size >= TINY_HIDDEN_SIZE:
        usual = f"{times * 1e-6:g} is usual{what} in RL"
        yield f"optimizer.lr={lr:g}: large for a model of this size; {usual}"
