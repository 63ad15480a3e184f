"""Checks of the algorithm: its rows, the knobs they have, what they ask of the batch.

Knobs are read from the rows' source files: nothing imports torch, except a module of the user's.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from framework.advantage_tables import (
    METADATA,
    advantage_names,
    advantage_table,
    flagged_advantages,
)
from framework.config import RunConfig
from framework.config_fields import nearest
from framework.critic_checks import reward_kl_errors
from framework.preference_checks import COMPARING, needs_reference
from framework.source_facts import row_defaults, row_knobs, table_keys
from framework.teacher_checks import teacher_errors, teacher_top_errors

ROWS = {
    # key: (folder and table, the function's name)
    "advantage": METADATA,
    "loss": ("losses", "LOSSES", "loss"),
    "correction": ("corrections", "CORRECTIONS", "weights"),
}
LOSS_TABLES = {
    # stage: where its losses are
    "rl": ROWS["loss"],
    "preference": ("preference", "PREFERENCE_LOSSES", "loss"),
    "reward_model": ("reward", "REWARD_LOSSES", "loss"),
}
SIGNED = ("baseline", "covariance_low", "covariance_high")
"""Knobs that may be negative."""


def algorithm_errors(config: RunConfig) -> Iterator[str]:
    """One line for every row that is not there and every knob it does not have."""
    algorithm = config.algorithm
    for kind, (folder, table, function) in _tables(config).items():
        name = getattr(algorithm, kind)
        try:
            knobs = _knobs(folder, table, function, name)
        except ValueError as error:
            yield f"algorithm.{kind}={name}: {_other_stage(config, kind, name) or error}"
            continue
        given = getattr(algorithm, f"{kind}_args")
        yield from _arguments(f"algorithm.{kind}_args", given, knobs)
        yield from _ranges(f"algorithm.{kind}_args", {**_defaults(folder, function, name), **given})
    if config.mode != "eval" and config.stage != "sft":
        yield from _reference(config)
    if config.stage != "rl" or config.mode == "eval":
        return
    compare = flagged_advantages("compares_group")
    if algorithm.advantage in compare and config.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: "
            f"algorithm.advantage={algorithm.advantage} compares samples of a prompt; at least 2"
        )
    yield from _needs(config)
    yield from reward_kl_errors(config)
    if algorithm.loss == "negative_log_likelihood":
        yield (
            "algorithm.loss=negative_log_likelihood: ignores every reward; it is for stage=sft, "
            "which sets it itself"
        )


def _needs(config: RunConfig) -> Iterator[str]:
    """What a row asks of the rollout, or of the policy that ratios are taken against."""
    algorithm, greedy = config.algorithm, config.rollout.greedy_baseline
    yield from teacher_errors(config)
    yield from teacher_top_errors(config)
    if algorithm.advantage == "greedy_baseline" and not greedy:
        yield (
            "rollout.greedy_baseline=False: algorithm.advantage=greedy_baseline compares with the "
            "greedy answer; set true"
        )
    if greedy and algorithm.advantage in {*advantage_names()} - {"greedy_baseline"}:
        yield (
            f"rollout.greedy_baseline=True: algorithm.advantage={algorithm.advantage} makes no use "
            "of the greedy answers; set false, or algorithm=remax"
        )
    if algorithm.old_logprobs != "trainer" and algorithm.recompute_old_logprobs:
        yield (
            f"algorithm.old_logprobs={algorithm.old_logprobs}: takes nothing from the pass of "
            "algorithm.recompute_old_logprobs=True; set that to false"
        )
    own = ("none", "off_policy_sequence", "fresh")
    if algorithm.old_logprobs == "engine" and algorithm.correction not in own:
        yield (
            f"algorithm.correction={algorithm.correction}: with algorithm.old_logprobs=engine its "
            "weights are all 1; the ratio of the loss holds the whole difference"
        )


def _tables(config: RunConfig) -> dict[str, tuple[str, str, str]]:
    """The rows that this stage chooses from."""
    if config.stage in COMPARING:
        return {"loss": LOSS_TABLES[config.stage]}
    return {**ROWS, "advantage": advantage_table(config.algorithm.advantage) or METADATA}


def _other_stage(config: RunConfig, kind: str, name: str) -> str:
    """What is wrong with a loss that another stage has; empty: something else."""
    if kind != "loss":
        return ""
    for stage, (folder, table, _) in LOSS_TABLES.items():
        if name in table_keys("framework", f"algorithm/{folder}/__init__.py", table):
            return f"is for stage={stage}; " + {
                "preference": "choose algorithm=dpo or another preference loss",
                "reward_model": "choose algorithm=bradley_terry",
            }.get(config.stage, "set that")
    return ""


def _reference(config: RunConfig) -> Iterator[str]:
    algorithm, resume = config.algorithm, config.checkpoint.resume
    wanted = needs_reference(config)
    if config.stage in COMPARING:
        why = f"algorithm.loss={algorithm.loss}"
        unused = f"{why} has no reference policy"
    else:
        named = "kl_coef" if algorithm.kl_coef else "kl_reward_coef"
        why = f"algorithm.{named}={getattr(algorithm, named):g}"
        unused = (
            "not used while algorithm.kl_coef=0 (and kl_reward_coef=0); set a coefficient, for "
            "example 0.001"
        )
    if algorithm.reference and not wanted:
        yield f"algorithm.reference={algorithm.reference}: {unused}"
    every, saved = algorithm.reference_refresh_steps, config.checkpoint.every_steps
    if every and not wanted:
        yield f"algorithm.reference_refresh_steps={every}: {unused}"
    elif every and saved % every:
        yield (
            f"checkpoint.every_steps={saved}: between two refreshes of the reference, whose weights"
            f" no checkpoint holds; a multiple of algorithm.reference_refresh_steps={every}"
        )
    if wanted and not algorithm.reference and resume not in ("auto", "never"):
        yield (
            f"{why}: checkpoint.resume={resume} begins with "
            "weights that are no Hugging Face directory; name the reference by algorithm.reference"
        )


def _knobs(folder: str, table: str, function: str, name: str) -> dict[str, str]:
    """Knob -> type text of a row; ValueError says what is wrong with its name."""
    rows = table_keys("framework", f"algorithm/{folder}/__init__.py", table)
    if name in rows:
        return row_knobs(folder, name)
    if "." not in name:
        rows = advantage_names() if function == METADATA.function else rows
        guess = next((row for row in rows if row.startswith(name)), nearest(name, rows))
        hint = f"did you mean {guess}? " if guess else ""
        raise ValueError(f"{hint}must be one of {', '.join(rows)}, or package.module")
    from framework.algorithm_rows import find_row

    config = find_row({}, name, function).config
    return {field.name: _type_text(field.type) for field in dataclasses.fields(config)}


def _defaults(folder: str, function: str, name: str) -> dict[str, Any]:
    """Knob -> what it is unless given, of a row that is there."""
    if "." not in name:
        return row_defaults(folder, name)
    from framework.algorithm_rows import find_row

    config = find_row({}, name, function).config
    return {field.name: field.default for field in dataclasses.fields(config)}


def _ranges(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Where a lower bound is not below its upper one; `values`: all knobs of the row."""
    low, high = values.get("low"), values.get("high")
    if _is_number(low) and _is_number(high) and 0 < high < low:
        yield f"{key}.low={low}: above {key}.high={high}"
    low, high = values.get("covariance_low"), values.get("covariance_high")
    if _is_number(low) and _is_number(high) and high <= low:
        yield (
            f"{key}.covariance_low={low}: must be below {key}.covariance_high={high}, or no token "
            "is chosen"
        )


def _type_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _arguments(key: str, values: Mapping[str, Any], knobs: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        if name not in knobs:
            guess = nearest(name, knobs)
            hint = f"did you mean {guess}?" if guess else f"its knobs: {', '.join(knobs) or 'none'}"
            yield f"{key}.{name}={value}: {key.removesuffix('_args')} has no such knob; {hint}"
        elif problem := _problem(name, knobs[name], value):
            yield f"{key}.{name}={value}: {problem}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _problem(name: str, type_text: str, value: Any) -> str | None:
    if type_text.startswith("dict"):
        numbers = isinstance(value, Mapping) and all(_is_number(v) for v in value.values())
        return None if numbers else "a mapping of names to finite numbers is wanted"
    if type_text == "bool":
        return None if isinstance(value, bool) else "bool wanted"
    if type_text in ("int", "float"):
        accepted = int if type_text == "int" else int | float
        if isinstance(value, bool) or not isinstance(value, accepted):
            return f"{type_text} wanted"
        if name == "teacher_share" and not 0 <= value <= 1:
            return "must be in [0, 1]: 0 is the forward, 1 the reverse KL divergence"
        if not math.isfinite(value) or (value < 0 and name not in SIGNED):
            return "a finite number that is not negative is wanted"
        if name == "std_eps" and value == 0:
            return "must be greater than 0: a group of equal rewards has no spread to divide by"
        if name in ("beta", "share") and value == 0:
            return "must be greater than 0"
        if name.startswith("temperature_") and value == 0:
            return "must be greater than 0: the gate divides by it"
        if name == "dual_clip" and 0 < value <= 1:
            return "must be above 1 (0: off): it bounds the loss of a ratio beyond 1"
        if name == "share" and value > 1:
            return "a share is at most 1"
        if name == "label_smoothing" and value >= 0.5:
            return "must be below 0.5: a label that is as likely wrong as right says nothing"
        if name == "clip_low" and value > 1:
            return "must be in [0, 1]: a ratio is never below 0"
    return None
