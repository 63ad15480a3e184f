"""Reading a config.json so that nothing that changes the computation passes unnoticed.

Every field is taken, declared harmless, or complained about; all complaints come in one error.
"""

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers_version",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
"""Bookkeeping, bounds, generation defaults, and dropout (always 0 in training here)."""


class ConfigFields:
    """One config.json while it is read; `finish` raises what was wrong."""

    def __init__(self, config: Mapping[str, Any], architecture: str) -> None:
        self._config = config
        self._architecture = architecture
        self._known: set[str] = set(HARMLESS)
        self._complaints: list[str] = []

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default the field must be there."""
        self._known.add(name)
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            self.complain(f"{name} is missing")
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.complain(f"{name} is {value!r}; it must be a positive integer")
            return 1
        return value

    def count(self, name: str) -> int:
        """An integer of at least 0; 0 where absent."""
        value = self.value(name)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.complain(f"{name} is {value!r}; it must be an integer of at least 0")
            return 0
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        self._known.add(name)
        value = self._config.get(name)
        return self.positive(name, default if value is None else value)

    def positive(self, label: str, value: Any) -> float:
        """`value` as a float, or a complaint under `label`."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.complain(f"{label} is {value!r}; it must be a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        self._known.add(name)
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.complain(f"{name} is {value!r}; it must be true or false")
            return default
        return value

    def value(self, name: str) -> Any:
        """Any field, None where absent; the caller judges it."""
        self._known.add(name)
        return self._config.get(name)

    def must_be(self, name: str, wanted: Any) -> None:
        """A field that may be absent but, where set, has only one supported value."""
        value = self.value(name)
        if value is not None and value != wanted:
            self.complain(f"{name} is {value!r}; only {wanted!r} is supported")

    def complain(self, text: str) -> None:
        """Add a complaint."""
        self._complaints.append(text)

    def finish(self) -> None:
        """Raise ValueError with every complaint, unknown fields included (null means unset)."""
        for name in sorted(self._config.keys() - self._known):
            if self._config[name] is not None:
                self.complain(
                    f"{name} = {self._config[name]!r} is not a field known for "
                    f"{self._architecture}; it may change the computation"
                )
        if self._complaints:
            raise ValueError(
                f"config.json ({self._architecture}) cannot be used: " + "; ".join(self._complaints)
            )


def _rope_fields(fields: ConfigFields) -> tuple[float | None, dict[str, Any], set[str]]:
    """rope_theta, the other rope parameters and their types, from transformers 5's one field or
    the older two.
    """
    theta, scaling = fields.value("rope_theta"), fields.value("rope_scaling")
    parameters = fields.value("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            fields.complain(f"{name} is {value!r}; it must be an object")
            return theta, {}, {"default"}
    rope = dict(scaling or {}) if parameters is None else dict(parameters)
    if parameters is not None:
        if theta is not None and rope.get("rope_theta", theta) != theta:
            fields.complain(
                f"rope_theta is {theta!r} but rope_parameters.rope_theta is {rope['rope_theta']!r}"
            )
        if scaling and any(rope.get(key) != value for key, value in scaling.items()):
            fields.complain("rope_scaling and rope_parameters disagree")
    theta = rope.pop("rope_theta", theta)
    kinds = {str(rope.pop(key)) for key in ("rope_type", "type") if key in rope} or {"default"}
    return theta, rope, kinds


def read_rope(
    fields: ConfigFields, default_theta: float, default_partial: float = 1.0
) -> dict[str, Any]:
    """GPTModel's rotary arguments.

    Llama 3's scaling is supported with the constants that megatron-core 0.19.2 fixes; a head that
    is rotated in part only where default_partial says that the family has such.
    """
    theta, rope, kinds = _rope_fields(fields)
    given = [rope.pop("partial_rotary_factor", None)]
    if default_partial != 1.0:
        given.append(fields.value("partial_rotary_factor"))  # transformers 5 saves both
    found = {value for value in given if value is not None} or {default_partial}
    if len(found) > 1:
        fields.complain("partial_rotary_factor and rope_parameters disagree")
    partial = max(found)
    if partial != 1.0 and default_partial == 1.0:
        fields.complain("rope_parameters.partial_rotary_factor other than 1.0 is not supported")
    arguments: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_percent": fields.positive("partial_rotary_factor", partial),
        "rotary_base": fields.positive("rope_theta", default_theta if theta is None else theta),
    }
    if kinds == {"llama3"}:
        factor = fields.positive("rope_parameters.factor", rope.pop("factor", None))
        arguments |= {"rope_scaling": True, "rope_scaling_factor": factor}
        fixed = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        for key, wanted in fixed.items():
            value = rope.pop(key, None)
            if value != wanted:
                fields.complain(
                    f"rope_parameters.{key} is {value!r}; megatron-core computes {wanted!r} only"
                )
        kinds = {"default"}
    _refuse_rest(fields, rope, kinds)
    return arguments


def _refuse_rest(fields: ConfigFields, rope: Mapping[str, Any], kinds: set[str]) -> None:
    """Complain about a kind of scaling that nobody read, or about what is left of its numbers."""
    if kinds != {"default"}:
        fields.complain(f"rope type {', '.join(map(repr, sorted(kinds)))} is not supported")
        return
    for key, value in rope.items():
        if value is not None:
            fields.complain(f"rope_parameters.{key} = {value!r} is not known")


def read_latent_rope(fields: ConfigFields, default_theta: float) -> dict[str, Any]:
    """MLATransformerConfig's rotary arguments: none, or YaRN as DeepSeek-V3 has it."""
    theta, rope, kinds = _rope_fields(fields)
    arguments: dict[str, Any] = {
        "rope_type": "rope",
        "rotary_base": fields.positive("rope_theta", default_theta if theta is None else theta),
        "rotary_percent": 1.0,
    }
    if kinds == {"yarn"}:
        arguments |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": fields.positive(
                "rope_parameters.factor", rope.pop("factor", None)
            ),
            "beta_fast": fields.positive("rope_parameters.beta_fast", rope.pop("beta_fast", 32)),
            "beta_slow": fields.positive("rope_parameters.beta_slow", rope.pop("beta_slow", 1)),
            "mscale": fields.positive("rope_parameters.mscale", rope.pop("mscale", 1.0)),
            "original_max_position_embeddings": int(
                fields.positive(
                    "rope_parameters.original_max_position_embeddings",
                    rope.pop("original_max_position_embeddings", None),
                )
            ),
        }
        every = rope.pop("mscale_all_dim", None)
        arguments["mscale_all_dim"] = fields.positive("rope_parameters.mscale_all_dim", every)
        kinds = {"default"}
    _refuse_rest(fields, rope, kinds)
    return arguments
