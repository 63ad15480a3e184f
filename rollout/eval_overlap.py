"""What is evaluated is never trained on: all evaluation sets against what all domains train on.

A task keeps its own prompts apart. Where several read files (or have an end for other reasons), the
prompts of each set are compared with those of every domain, by what they say (`identity`). Tasks
without an end set the same eighth of all prompts aside, whichever domain or set draws them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rollout.boundary import close_environment
from rollout.config import DataConfig, RolloutConfig
from rollout.data import PromptStream
from rollout.eval_sets import read_sets
from rollout.mixture import domain_seed, read_domains


def check_overlap(
    data: DataConfig, rollout: RolloutConfig, sets: Mapping[str, Any], seed: int
) -> None:
    """ValueError where a prompt of an evaluation (`sets`: eval.sets) is one that is trained on."""
    domains = read_domains(data, rollout)
    if len(domains) + len(sets) == 1:
        return  # the task's own affair
    seen: dict[str, str] = {}
    for name, each in domains.items():
        stream = PromptStream(each.data, domain_seed(seed, name), "train")
        for identity in _identities(stream):
            seen.setdefault(identity, _called(name, "data.mixture"))
    for each in read_sets(sets, data, rollout, seed) if seen else ():
        stream = PromptStream(each.data, each.seed, "eval")
        table = "data.mixture" if each.in_total else "eval.sets"
        for identity in _identities(stream):
            if identity in seen:
                raise ValueError(
                    f"{_called(each.name, table)}: evaluates {identity:.200}, which "
                    f"{seen[identity]} trains on; what is evaluated is never trained on"
                )


def _called(name: str, table: str) -> str:
    return f"{table}.{name}" if name else "data"


def _identities(stream: PromptStream) -> Iterator[str]:
    """Of all prompts, where they have an end and are to be kept apart."""
    for index in range(stream.num_prompts):
        (environment,) = stream.environments(index, 1)
        kept_apart, identity = environment.hold_out, environment.identity()
        close_environment(environment)
        if not kept_apart:
            return
        yield identity
