"""Fields of the critic, of runs whose algorithm.advantage asks for one."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    """A second model with a scalar head, in the policy's layout, with an optimizer of its own."""

    init_from: str = ""
    """Hugging Face directory of the same architecture: a reward model's hf/ (its head is taken as
    well) or a language model's; or a reward model's Megatron checkpoint. Empty: what the policy
    begins with, and a head of zeros."""
    lr: float = 2e-3
    """The other fields of optimizer.* hold for both."""
    warmup_steps: int = 0
    """Linear warm-up of lr, in updates."""
    value_clip: float = 0.2
    """How far from its old value an estimate is worth moving in one step; 0: no clipping."""
    policy_starts_at_step: int = 0
    """In so many steps only the critic learns: the policy's learning rate is 0, though its
    optimizer's moments fill."""
    whiten: bool = True
    """Advantages of a step's tokens to mean 0 and deviation 1."""
    scale_rewards: bool = False
    """Rewards are divided by the standard deviation of all rewards so far, this step's included;
    it is in checkpoints. A penalty of algorithm.kl_reward_coef is not divided."""
    normalize_values: bool = False
    """The critic estimates returns less the mean of all returns so far, over their standard
    deviation; advantages are of returns as they are. Both numbers are in checkpoints."""
