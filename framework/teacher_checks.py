"""What is refused of distillation: a teacher that is missing, unused or not comparable."""

from collections.abc import Iterator

from framework.advantage_tables import TOKENS, advantage_table
from framework.config import RunConfig
from framework.mixture_checks import named_domains
from framework.model_shape import read_model_shape
from framework.source_facts import row_flags

REWARD_FILTERS = ("dynamic_sampling",)
"""Rows of rollout.filters.FILTERS that look at rewards."""


def teacher_errors(config: RunConfig) -> Iterator[str]:
    """Whether the teacher that an advantage compares with is there, and used."""
    teacher, advantage = config.rollout.teacher, config.algorithm.advantage
    needed = advantage_table(advantage) == TOKENS
    if needed and not teacher and config.mode != "train_only":
        yield (
            f"rollout.teacher: algorithm={config.algorithm.name} (its advantage is {advantage}) "
            "compares with one; name a model of rollout.side_models"
        )
    if teacher and not needed and "." not in advantage:
        yield (
            f"rollout.teacher={teacher}: algorithm.advantage={advantage} does not ask it; leave it "
            "empty, or algorithm=on_policy_distillation"
        )
    if not needed:
        return
    temperature = config.rollout.sampling.temperature
    if temperature != 1.0:
        yield (
            f"rollout.sampling.temperature={temperature}: a teacher's log-probs are those at 1, so "
            f"algorithm.advantage={advantage} needs 1.0"
        )
    for key, filters in _filters(config):
        for name in REWARD_FILTERS:
            if name in filters:
                yield (
                    f"{key}={name}: chooses groups by rewards, which teach nothing with "
                    f"algorithm.advantage={advantage}; leave it out"
                )
    if config.rollout.keep_share < 1:
        yield (
            f"rollout.keep_share={config.rollout.keep_share}: chooses groups by rewards, which "
            f"teach nothing with algorithm.advantage={advantage}; 1"
        )


def _filters(config: RunConfig) -> Iterator[tuple[str, list[str]]]:
    """The filters of groups that are at work, by their key."""
    try:
        domains = named_domains(config)
    except ValueError:
        return  # told by the checks of the mixture
    if not domains:
        yield "rollout.filters", config.rollout.filters
    for domain in domains:
        yield f"data.mixture.{domain.name}.filters", domain.filters


def teacher_top_errors(config: RunConfig) -> Iterator[str]:
    """Whether the teacher's likeliest tokens are there where the loss compares with them."""
    algorithm, k = config.algorithm, config.rollout.teacher_top_k
    flags = row_flags("framework", "algorithm/losses/__init__.py", "LOSSES")
    needed, own = flags.get(algorithm.loss, {}).get("teacher_top", False), "." in algorithm.loss
    if needed and not k:
        yield (
            f"rollout.teacher_top_k=0: algorithm.loss={algorithm.loss} compares with the teacher's "
            "likeliest tokens; for example 32"
        )
    if needed and advantage_table(algorithm.advantage) != TOKENS:
        yield (
            f"algorithm.advantage={algorithm.advantage}: algorithm.loss={algorithm.loss} uses no "
            "advantage, so rewards would teach nothing; reverse_kl, as algorithm=gkd has it"
        )
    if k > 0 and not needed and not own:
        yield (
            f"rollout.teacher_top_k={k}: algorithm.loss={algorithm.loss} does not use them; 0, or "
            "algorithm=gkd"
        )
    if k > 0 and own and not config.rollout.teacher and config.mode != "train_only":
        yield (
            f"rollout.teacher_top_k={k}: rollout.teacher is empty; name a model of "
            "rollout.side_models, or 0"
        )
    try:
        vocab_size = read_model_shape(config.model).vocab_size
    except ValueError:
        return  # told by the checks of the model
    if k > vocab_size:
        yield (
            f"rollout.teacher_top_k={k}: the vocabulary has {vocab_size} tokens; at most so many"
        )
