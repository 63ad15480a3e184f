"""Checks of data.mixture, data.curriculum and eval.sets.

Each domain and each set is looked at as a run of its own; what is wrong is told under the keys that
the user wrote.
"""

import dataclasses
import re
from collections.abc import Iterator

from framework.compose import without_keys
from framework.config import RunConfig
from framework.field_rules import field_errors
from rollout.config import DataConfig
from rollout.eval_sets import EvalSettings, read_sets
from rollout.mixture import OF_TASK, DomainSettings, read_domains

_OWN_KEYS = ("data.", "rollout.sampling.")


def mixture_errors(config: RunConfig) -> Iterator[str]:
    """One line for each thing that is wrong, but for what only their packages know."""
    data = config.data
    if data.curriculum.enabled and len(data.mixture) < 2:
        yield "data.curriculum.enabled=true: needs a data.mixture of at least two domains"
    if data.curriculum.enabled and config.mode == "rollout_only":
        yield (
            "data.curriculum.enabled=true: mode=rollout_only starts all its groups at once; there "
            "is no pass rate to follow"
        )
    if data.mixture:
        yield from _of_the_run(config)
    if config.stage != "rl" and config.eval.sets:
        yield f"eval.sets={list(config.eval.sets)}: stage={config.stage} has no engine to ask"
    try:
        domains = named_domains(config)
        sets = named_sets(config)
    except ValueError as error:
        yield str(error)
        return
    for domain in domains:
        yield from _of_domain(config, domain)
    for each in sets:
        own = as_run(config, each)
        yield from _relabelled(each, _fields(own))
        if each.num_prompts == 0 and "task" not in config.eval.sets[each.name]:
            yield f"eval.sets.{each.name}.num_prompts=0: must be greater than 0"
    plays = {each.name: each.data.generate for each in domains} or {"data": config.data.generate}
    plays |= {f"eval.sets.{each.name}": each.data.generate for each in sets}
    agents = [name for name, program in plays.items() if program == "agent"]
    if config.rollout.agent_port and len(agents) > 1:
        yield (
            f"rollout.agent_port={config.rollout.agent_port}: {', '.join(agents)} have an endpoint "
            "each; must be 0 (any free ports)"
        )


def named_domains(config: RunConfig) -> list[DomainSettings]:
    """The domains of data.mixture; ValueError: what is wrong, with its key."""
    found = read_domains(config.data, config.rollout)
    return [domain for name, domain in found.items() if name]


def named_sets(config: RunConfig) -> list[EvalSettings]:
    """The rows of eval.sets; ValueError: what is wrong, with its key."""
    found = read_sets(config.eval.sets, config.data, config.rollout, config.seed)
    return [each for each in found if not each.in_total]


def as_run(config: RunConfig, of: DomainSettings | EvalSettings) -> RunConfig:
    """A run of this task alone."""
    filters = of.filters if isinstance(of, DomainSettings) else []
    rollout = dataclasses.replace(config.rollout, sampling=of.sampling, filters=filters)
    evaluation = dataclasses.replace(config.eval, sets={})
    return dataclasses.replace(config, data=of.data, rollout=rollout, eval=evaluation)


def relabel(of: DomainSettings | EvalSettings, error: str) -> str:
    """The line with the keys as the user wrote them."""
    table = "data.mixture" if isinstance(of, DomainSettings) else "eval.sets"
    key = f"{table}.{of.name}"
    names = "|".join(each.name for each in dataclasses.fields(DataConfig))
    error = re.sub(r"\brollout\.(?=(sampling|filters)\b)", f"{key}.", error)
    return re.sub(rf"(?<![\w/.-])data\.(?=({names})\b)(?!mixture\b)", f"{key}.", error)


def _of_the_run(config: RunConfig) -> Iterator[str]:
    data, names = config.data, ", ".join(config.data.mixture)
    if config.stage in ("preference", "reward_model"):
        yield f"data.mixture={names}: stage={config.stage} makes pairs of one task: data.task"
    if data.path:
        yield f"data.path={data.path}: data.mixture has tasks, and they have demonstrations"
    if config.rollout.prompts_per_step < len(data.mixture):
        yield (
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: fewer groups than "
            f"data.mixture has domains ({names})"
        )
    rows = [row for row in data.mixture.values() if isinstance(row, dict)]
    if all("task" in row for row in rows):
        plain = DataConfig()
        for name in OF_TASK:
            if (value := getattr(data, name)) != getattr(plain, name):
                yield (
                    f"data.{name}={without_keys(value)}: every domain of data.mixture has a "
                    f"task of its own, so none reads it; set data.mixture.<name>.{name}, or "
                    "data=mixture"
                )


def _of_domain(config: RunConfig, domain: DomainSettings) -> Iterator[str]:
    own, key = as_run(config, domain), f"data.mixture.{domain.name}"
    yield from _relabelled(domain, _fields(own))
    sampling, whole = domain.sampling, config.rollout.sampling
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(sampling, name)) != (wanted := getattr(whole, name)):
            yield (
                f"{key}.sampling.{name}={value}: trainers compute all log-probs at "
                f"rollout.sampling.{name}={wanted}"
            )
    if sampling.max_new_tokens > whole.max_new_tokens:
        yield (
            f"{key}.sampling.max_new_tokens={sampling.max_new_tokens}: at most "
            f"rollout.sampling.max_new_tokens={whole.max_new_tokens}, what batches are made for"
        )
    if "dynamic_sampling" in domain.filters and config.rollout.samples_per_prompt == 1:
        yield f"{key}.filters=dynamic_sampling: drops every group of one sample"


def _fields(own: RunConfig) -> Iterator[str]:
    return (error for key, error in field_errors(own) if key.startswith(_OWN_KEYS))


def _relabelled(of: DomainSettings | EvalSettings, errors: Iterator[str]) -> Iterator[str]:
    # An evaluation may be greedy.
    greedy = isinstance(of, EvalSettings) and of.sampling.temperature == 0
    for error in errors:
        if not (greedy and error.startswith("rollout.sampling.temperature=0")):
            yield relabel(of, error)
