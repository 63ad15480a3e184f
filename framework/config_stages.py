"""Fields of the stages that have no engines: supervised training and preferences."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised steps on the task's own demonstrations before the main stage (0: none)."""

    num_steps: int = 0
    batch_size: int = 96
    """Demonstrations in one step of stage=sft, here and in a stage of its own."""
    lr: float = 3e-3
    warmup_steps: int = 30
    beta2: float = 0.98
    weight_decay: float = 0.01


@dataclass(kw_only=True, slots=True)
class PreferenceConfig:
    """Batches of stage=preference and stage=reward_model."""

    batch_size: int = 64
    """Pairs in one step (labelled answers, for losses that take those)."""
