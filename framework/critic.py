"""From a run's configuration to its critic."""

import dataclasses
from pathlib import Path
from typing import Any

from framework.algorithm.critic import VALUE_ADVANTAGES
from framework.checkpoints import Checkpoint
from framework.config import RunConfig
from framework.critic_checks import uses_critic


def build_critic(config: RunConfig, mesh: Any, found: Checkpoint | None) -> Any:
    """The critic, from the checkpoint if there is one; None where the algorithm has none."""
    if not uses_critic(config):
        return None
    from framework.megatron.checkpoint import load_critic
    from framework.megatron.critic import Critic
    from framework.megatron.model import build_policy, read_hf_config
    from framework.megatron.sharded_state import blank_weights
    from megatron_bridge.load import load_hf, load_hf_body
    from megatron_bridge.models.score_head import has_score_head, score_config

    model, critic, algorithm = config.model, config.critic, config.algorithm
    hf_config = score_config(read_hf_config(model.hf_path))
    first = Path(critic.init_from or model.init_from or model.hf_path).expanduser()

    def fill(chunks: list[Any]) -> None:
        if found is not None:
            blank_weights(chunks)
            return
        load = load_hf if has_score_head(read_hf_config(first)) else load_hf_body
        load(chunks, first, mesh.layout, mesh.coords, model.vocab_pad_multiple, hf_config)

    optimizer = dataclasses.replace(config.optimizer, lr=critic.lr)
    built = build_policy(hf_config, model, config.parallel, optimizer, mesh, fill, config.memory)
    if found is not None:
        load_critic(found, built)
    estimate = VALUE_ADVANTAGES[algorithm.advantage].bind(algorithm.advantage_args)
    return Critic(built, mesh, critic, estimate)
