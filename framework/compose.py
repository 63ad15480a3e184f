"""From Hydra groups and command-line overrides to one RunConfig, and to and from config.yaml.

The dataclasses are the schema: an unknown key, a wrong type, an unknown group option or bad syntax
ends in a ConfigError that names the key, the value and what would be right. `OmegaConf.to_object`
is called once for a run; every role reads `run_dir/config.yaml` back with `load_run_config`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.config import RunConfig
from framework.config_fields import ELSEWHERE, config_fields, nearest, open_dict_of

CONFIG_MODULE = "hydra_configs"
ARGUMENTS_OF = {
    "algorithm.advantage": "algorithm.advantage_args",
    "algorithm.loss": "algorithm.loss_args",
    "algorithm.correction": "algorithm.correction_args",
    "data.task": "data.args",
}
"""Arguments belong to what they are arguments of: where the command line names another one, those
that a yaml gave go with the old one."""
HF_CONFIGS = "hf_configs/"
"""A model.hf_path that begins so is one of the config.json files that come with us, without
weights: enough for dry_run."""


SECRET = "api_key"
SECRET_TABLES = ("variables", "headers")
"""Mappings whose values may be keys: a tool server's environment, what goes with a call."""
_LEFT_OUT = "(left out)"


class ConfigError(ValueError):
    """A configuration that cannot be run; `errors` holds one line per thing that is wrong."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


def group_options(config_dir: str = "") -> dict[str, list[str]]:
    """Every group and its options, the user's own directory included."""
    roots: list[Any] = [resources.files(CONFIG_MODULE)]
    if config_dir:
        roots.append(Path(config_dir))
    options: dict[str, set[str]] = {}
    for root in roots:
        for group in root.iterdir():
            if not group.is_dir() or group.name.startswith(("_", ".")):
                continue
            names = {item.name[:-5] for item in group.iterdir() if item.name.endswith(".yaml")}
            if names:
                options.setdefault(group.name, set()).update(names)
    return {group: sorted(names) for group, names in sorted(options.items())}


def compose_config(overrides: Sequence[str], config_dir: str = "") -> RunConfig:
    """The run that `overrides` describe, run_dir filled in.

    Args:
        overrides: `key=value` and `group=option`, as typed.
        config_dir: a directory of the user's own groups, searched after ours.

    Raises:
        ConfigError: the overrides do not make a RunConfig.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError([f"--config-dir {config_dir}: no such directory"])
    groups = group_options(config_dir)
    parsed = _parse(overrides)
    errors = [error for item in parsed if (error := _override_error(item, groups))]
    if errors:
        raise ConfigError(errors)
    lines = [_hydra_line(item, groups) for item in parsed]
    if config_dir:
        lines.append(f"hydra.searchpath=['file://{Path(config_dir).resolve()}']")
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module=CONFIG_MODULE, version_base="1.3"):
            composed = compose(config_name="config", overrides=lines)
            _drop_arguments(composed, parsed, lines)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_hydra_message(error, parsed)]) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(config, RunConfig)
    if config.model.hf_path.startswith(HF_CONFIGS):
        root = Path(str(resources.files(CONFIG_MODULE)))
        config.model.hf_path = str(root / "model" / config.model.hf_path)
    config.run_dir = str(Path(config.run_dir or f"runs/{config.name}").expanduser().absolute())
    return config


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed, errors = [], []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed.extend(parser.parse_overrides([text]))
        except HydraException as error:
            if "=" not in text:
                hint = f"{text!r}: an override is written key=value"
            else:
                reason = str(error.__cause__ or error).splitlines()[0]
                hint = (
                    f"{text!r}: not valid override syntax ({reason}); quote a value that holds "
                    "spaces, commas or brackets: 'key=\"a b\"'"
                )
            errors.append(hint)
    if errors:
        raise ConfigError(errors)
    return parsed


def _override_error(item: Override, groups: dict[str, list[str]]) -> str | None:
    """What is wrong with one override's key, as one line; None: Hydra may look at its value."""
    text = item.input_line or str(item.key_or_group)
    key, value = item.key_or_group, item.value()
    if item.is_sweep_override():
        return f"{text}: sweeps are not run here; start one run for each value"
    if item.is_delete():
        return f"{text}: a key cannot be deleted; give it the value you want"
    fields = config_fields()
    if key in groups and isinstance(value, str):
        if value in groups[key]:
            return None
        guess = nearest(value, groups[key])
        hint = f"did you mean {guess}? " if guess else ""
        return f"{key}={value}: unknown option; {hint}options: {', '.join(groups[key])}"
    if key in groups:
        return f"{text}: {key} is a group and takes one of: {', '.join(groups[key])}"
    if key in fields or open_dict_of(key):
        return None
    if any(field.startswith(f"{key}.") for field in fields):
        return f"{text}: {key} is a section; set one of its keys, e.g. {_first_key(key)}=..."
    return _unknown_key(key, value)


def _first_key(section: str) -> str:
    return next(key for key in config_fields() if key.startswith(f"{section}."))


def _unknown_key(key: str, value: Any) -> str:
    groups = () if "." in key else group_options()
    named = ELSEWHERE.get(key.rpartition(".")[2])
    guess = named or nearest(key, [*groups, *config_fields()])
    hint = f"did you mean {guess}?" if guess else "`drivetrain --help` lists every key"
    shown = "" if value is None else f"={value}"
    return f"{key}{shown}: no such key; {hint}"


def _hydra_line(item: Override, groups: dict[str, list[str]]) -> str:
    """The override as Hydra wants it: `++` for open dicts, whose keys it does not know."""
    line = (item.input_line or "").lstrip("+")
    if item.key_or_group in groups:
        # config.yaml names every group but experiment with an option; Hydra overrides both.
        return line
    key, fields = item.key_or_group, config_fields()
    is_open = open_dict_of(key) or (key in fields and fields[key].is_open)
    return f"++{line}" if is_open else line


def _drop_arguments(composed: DictConfig, parsed: Sequence[Override], lines: list[str]) -> None:
    """Where the command line names another row, of its arguments only those it gives as well."""
    typed = {item.key_or_group: item.value() for item in parsed}
    for key, arguments in ARGUMENTS_OF.items():
        if key not in typed:
            continue
        others = [line for line in lines if not line.startswith(f"{key}=")]
        before = compose(config_name="config", overrides=others)
        if OmegaConf.select(before, key) == OmegaConf.select(composed, key):
            continue
        _keep_typed(composed, typed, arguments)
    domains = OmegaConf.select(composed, "data.mixture").values()
    if domains and all("task" in row for row in domains if isinstance(row, DictConfig)):
        _keep_typed(composed, typed, "data.args")  # they are of no domain's task


def _keep_typed(composed: DictConfig, typed: dict[str, Any], arguments: str) -> None:
    whole, prefix = typed.get(arguments), f"{arguments}."
    kept = set(whole) if isinstance(whole, dict) else set()
    kept |= {name[len(prefix) :].split(".")[0] for name in typed if name.startswith(prefix)}
    node = OmegaConf.select(composed, arguments)
    left = {name: value for name, value in node.items() if name in kept}
    OmegaConf.update(composed, arguments, left, merge=False)


def _hydra_message(error: Exception, parsed: Sequence[Override]) -> str:
    """Hydra's and OmegaConf's multi-line messages as one line naming key and value."""
    root: BaseException = error
    while root.__cause__ is not None and isinstance(root.__cause__, OmegaConfBaseException):
        root = root.__cause__
    text = str(root)
    full_key = getattr(root, "full_key", None) or ""
    if not full_key:
        match = re.search(r"full_key: (\S+)", text)
        full_key = match.group(1) if match else ""
    reason = " ".join(line.strip() for line in text.splitlines() if line.strip())
    reason = re.sub(r"\s*(full_key|object_type|reference_type|offending value):?.*$", "", reason)
    if full_key and full_key not in config_fields() and not open_dict_of(full_key):
        return _unknown_key(full_key, None)
    for item in parsed:
        if item.key_or_group == full_key:
            wanted = config_fields()[full_key].type_name if full_key in config_fields() else ""
            if wanted and "could not be converted" in reason:
                return f"{item.input_line}: {wanted} is wanted"
            hint = f" ({wanted} wanted)" if wanted else ""
            return f"{item.input_line}: {reason}{hint}"
    return f"{full_key}: {reason}" if full_key else reason


def config_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as plain YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def without_keys(value: Any) -> Any:
    """The same mappings and lists, every secret in them replaced: for what people are shown."""
    if isinstance(value, Mapping):
        return {name: _without_key(name, each) for name, each in value.items()}
    return [without_keys(each) for each in value] if isinstance(value, list) else value


def _without_key(name: Any, value: Any) -> Any:
    if name in SECRET_TABLES and isinstance(value, Mapping):
        return {each: _LEFT_OUT if inner else inner for each, inner in value.items()}
    if name in (SECRET, *SECRET_TABLES) and value:
        return _LEFT_OUT
    return without_keys(value)


def shown_yaml(config: RunConfig) -> str:
    """config_yaml() without keys of engines, side models, rewards' services and tool servers."""
    values = without_keys(dataclasses.asdict(config))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def file_mode(config: RunConfig) -> int:
    """Of a file with config_yaml(): its owner's alone where there is a key in it."""
    values = dataclasses.asdict(config)
    return 0o644 if without_keys(values) == values else 0o600


def load_run_config(run_dir: str | Path) -> RunConfig:
    """The RunConfig a run directory was written with.

    Raises:
        ConfigError: no config.yaml there, or one that is not a RunConfig of this version.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError([f"{path}: no such file; {run_dir} is not a run directory"])
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: a mapping of configuration keys is wanted"])
    key = ""
    try:
        merged = OmegaConf.structured(RunConfig)
        for key, value in values.items():  # one by one: OmegaConf does not always say which failed
            merged = OmegaConf.merge(merged, {key: _literal(value)})
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = _hydra_message(error, [])
        where = message if str(key) in message else f"{key}: {message}"
        raise ConfigError([f"{path}: {where}"]) from error
    assert isinstance(config, RunConfig)
    return config


def _literal(value: Any) -> Any:
    """Escape `${`: config.yaml is resolved, a shell variable in it is no interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
