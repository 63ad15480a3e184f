"""Two-bit weights: -1, 0 or 1 times a scale for each row, the largest magnitude in it.

Symmetric rounding to nearest, one scale for each output channel: the plainest two-bit format, and
the one that changes a model most.
"""

import torch


def round_int2(weight: torch.Tensor) -> torch.Tensor:
    """A weight [R, C] of any float type, rounded to the nearest that the format holds, float32.

    Raises:
        ValueError: the weight is not finite.
    """
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True)
    if not scale.isfinite().all():
        raise ValueError("it holds values that are not finite, which two bits cannot")
    scale[scale == 0] = 1.0
    return (values / scale).round() * scale
