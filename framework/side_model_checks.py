"""What is refused of the models beside the policy, and of who names them. Reads files only."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from framework.config import RunConfig
from framework.mixture_checks import as_run, named_domains, named_sets, relabel
from framework.model_shape import read_hf_config
from framework.tiny_model import tiny_vocabulary
from megatron_bridge.models.score_head import has_score_head
from rollout.rewards.weighted import read_terms
from rollout.server.arguments import check_names, serves_architecture
from rollout.side_models import SideModel, read_side_models

WANTED_KIND = {"judge": "generate", "reward_model": "classify"}
"""Of the side model that a kind of reward names by args.side_model."""


def side_model_errors(config: RunConfig) -> Iterator[str]:
    """One line for each that is wrong."""
    try:
        models = read_side_models(config.rollout.side_models)
    except ValueError as error:
        yield str(error)
        return
    for name, model in models.items():
        key = f"rollout.side_models.{name}"
        if model.model_path:
            yield from _directory(key, model, config.dry_run)
        try:
            yield from check_names(model.args, f"{key}.args")
        except ValueError as error:
            yield f"{key}.args: cannot be checked: {error}"
    if teacher := config.rollout.teacher:
        yield from _wrong_side_model(
            config, models, "rollout.teacher", teacher, "generate", takes_token_ids=True
        )
    try:
        parts = [*named_domains(config), *named_sets(config)]
    except ValueError:
        return  # told by their own checks
    if not config.data.mixture:
        yield from _named_by_rewards(config, models)
    for part in parts:
        named = _named_by_rewards(as_run(config, part), models)
        yield from (relabel(part, error) for error in named)


def _directory(key: str, model: SideModel, dry_run: bool) -> Iterator[str]:
    key = f"{key}.model_path"
    try:
        values = read_hf_config(key, model.model_path)
    except ValueError as error:
        yield str(error)
        return
    path = Path(model.model_path).expanduser()
    if not dry_run and not any(path.glob("*.safetensors")):
        yield f"{key}={model.model_path}: no *.safetensors in it"
    (architecture, *_) = values.get("architectures") or [""]
    scored = has_score_head(values)
    if model.kind == "generate" and scored:
        yield f"{key}={model.model_path}: {architecture} has scores for text; kind=classify"
    elif model.kind == "classify" and str(architecture).endswith("ForCausalLM"):
        yield (
            f"{key}={model.model_path}: {architecture} has no score head, which kind=classify "
            "asks; make one by stage=reward_model"
        )
    elif model.kind == "classify" and scored:
        labels = len(values.get("id2label") or {"0": "", "1": ""})
        if labels != 1:
            yield f"{key}={model.model_path}: its head has {labels} labels; a reward is one"
        if not serves_architecture(architecture):
            yield f"{key}={model.model_path}: the installed SGLang does not serve {architecture}"


def _named_by_rewards(config: RunConfig, models: dict[str, SideModel]) -> Iterator[str]:
    try:
        terms = read_terms(config.data.rewards)
    except ValueError:
        return  # told by the checks of the task
    for name, term in terms.items():
        side_model = term.args.get("side_model")
        if not isinstance(side_model, str) or term.kind not in WANTED_KIND:
            continue
        key = f"data.rewards.{name}.args.side_model"
        yield from _wrong_side_model(
            config,
            models,
            key,
            side_model,
            WANTED_KIND[term.kind],
            takes_token_ids=term.kind == "reward_model",
        )


def _wrong_side_model(
    config: RunConfig,
    models: dict[str, SideModel],
    key: str,
    name: str,
    kind: str,
    *,
    takes_token_ids: bool,
) -> Iterator[str]:
    """One line where `key` names a side model that is not there, or cannot do what is asked."""
    if (model := models.get(name)) is None:
        known = ", ".join(models) or "none"
        yield f"{key}={name}: no such model in rollout.side_models ({known})"
        return
    if model.kind != kind:
        yield f"{key}={name}: is of kind={model.kind}; kind={kind} is wanted"
    policy = config.model.hf_path
    if takes_token_ids and model.model_path:
        theirs = _vocabulary(model.model_path)
        ours = _vocabulary(policy) if policy else tiny_vocabulary()
        if theirs is not None and ours is not None and theirs != ours:
            whose = f"model.hf_path={policy}" if policy else "model.tiny"
            yield (
                f"rollout.side_models.{name}.model_path={model.model_path}: its tokenizer is not "
                f"that of {whose}, whose token ids it would be given"
            )


@cache
def _vocabulary(directory: str) -> dict[str, int] | None:
    """Token -> id of a directory's tokenizer.json; None where there is none to compare."""
    try:
        data = json.loads((Path(directory).expanduser() / "tokenizer.json").read_bytes())
        vocabulary = data["model"]["vocab"]
        added = {each["content"]: each["id"] for each in data.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**vocabulary, **added} if isinstance(vocabulary, dict) else None
