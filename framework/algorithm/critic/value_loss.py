"""What a critic is trained by."""

import torch


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), the clipped value loss of
    PPO's reference code (arXiv 1707.06347 has it without the clip).

    Args:
        values: [T], carries the gradient.
        old_values: [T], the critic's before this step's first update.
        returns: [T], advantage before whitening + old value.
        clip: 0: 1/2 (V - R)^2.

    Returns:
        [T] loss per token, unreduced; [T] 1 where the clipped error was the larger one.
    """
    plain = (values - returns) ** 2
    if not clip:
        return 0.5 * plain, torch.zeros_like(plain)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).detach().float()
