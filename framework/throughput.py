"""How fast a step trained: model operations and tokens, per second and per rank."""

from collections.abc import Sequence

import torch

from framework.flops import TrainingFlops
from framework.gpus import GPUS


def device_peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second of the device called `name`; None where we know of none."""
    return next((gpu.peak_bf16_flops for part, gpu in GPUS.items() if part in name), None)


def train_figures(
    lengths: Sequence[int],
    flops: TrainingFlops,
    *,
    train_s: float,
    num_ranks: int,
    peak_flops: float | None = None,
) -> dict[str, float]:
    """Figures of training on sequences of `lengths` tokens, unpadded, in `train_s` seconds.

    Model operations as `flops` counts them: forward and backward of policy and critic, and the
    passes of reference, old policy and critic that the algorithm asks for; not recomputation, nor
    the gate's pass before the first update, whose time is in train_s. perf/mfu (arXiv 2204.02311,
    appendix B) is there where the device's peak is known.
    """
    operations = sum(map(flops, lengths))
    per_rank = operations / train_s / num_ranks
    figures = {
        "perf/rank_tokens_per_s": sum(lengths) / train_s / num_ranks,
        "perf/rank_flops_per_s": per_rank,
    }
    return figures if peak_flops is None else figures | {"perf/mfu": per_rank / peak_flops}


def step_figures(
    lengths: Sequence[int],
    flops: TrainingFlops,
    *,
    wait_s: float,
    train_s: float,
    sync_s: float,
    num_ranks: int,
    peak_flops: float | None = None,
) -> dict[str, float]:
    """Figures of one whole step: waiting for its batch, training on it, bringing the engines up."""
    step_s = wait_s + train_s + sync_s
    return {
        "perf/step_time_s": step_s,
        "perf/wait_s": wait_s,
        "perf/train_s": train_s,
        "perf/weight_sync_s": sync_s,
        "perf/tokens_per_s": sum(lengths) / step_s,
        **train_figures(
            lengths, flops, train_s=train_s, num_ranks=num_ranks, peak_flops=peak_flops
        ),
    }


def this_device_peak_flops() -> float | None:
    """The peak of this rank's device."""
    if not torch.cuda.is_available():
        return None
    return device_peak_flops(torch.cuda.get_device_name())
