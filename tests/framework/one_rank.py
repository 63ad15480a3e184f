"""A policy with routers in this process, to pack for, to score with, to take gradients of."""

import functools
from pathlib import Path
from typing import Any

import torch

from framework.algorithm.inputs import LossOutput
from framework.config import MemoryConfig, ModelConfig, OptimizerConfig, ParallelConfig
from framework.megatron.microbatch import Microbatch, pack_microbatch
from framework.megatron.model import build_policy, read_hf_config
from framework.megatron.parallel import start_mesh
from framework.megatron.routing_replay import RoutingReplay
from framework.megatron.step import StepRunner
from megatron_bridge.load import load_hf
from rollout.types import Sample


class OneRank:
    """A policy with its routers, in this process."""

    def __init__(
        self, moe_dir: Path, replay: str, recompute: str = "none", dtype: str = "float32"
    ) -> None:
        parallel = ParallelConfig()
        self.mesh = start_mesh(parallel, 0)
        load = functools.partial(
            load_hf,
            hf_dir=moe_dir,
            layout=self.mesh.layout,
            coords=self.mesh.coords,
            vocab_pad_multiple=8,
        )
        self.policy = build_policy(
            read_hf_config(moe_dir),
            ModelConfig(hf_path=str(moe_dir), dtype=dtype),
            parallel,
            OptimizerConfig(lr=1e-2, warmup_steps=0),
            self.mesh,
            load,
            MemoryConfig(recompute=recompute),
        )
        self.routing = RoutingReplay(self.policy, replay)
        self.runner = StepRunner(self.policy, self.mesh, 1.0, 4096, self.routing)

    def pack(self, *samples: Sample) -> Microbatch:
        numbers = range(len(samples))
        return pack_microbatch(
            numbers,
            dict(enumerate(samples)),
            {i: torch.full((s.response_length,), 1.0 + i) for i, s in enumerate(samples)},
            dict.fromkeys(numbers, 0.1),
            self.mesh,
            sequence_parallel=False,
            route_layout=self.routing.layout,
        )

    def gradients(self, *batches: Microbatch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Figures and gradients of an update that moves nothing."""

        def objective(inputs: Any) -> Any:
            return LossOutput(loss=-inputs.advantages * inputs.policy_logprobs, metrics={})

        figures = self.runner.update(list(batches), objective, 0.0)
        (chunk,) = self.policy.chunks
        return figures, {
            name: parameter.main_grad.clone()  # pyright: ignore[reportAttributeAccessIssue]
            for name, parameter in chunk.named_parameters()
        }
