"""The process groups of a trainer rank, and its place among them."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from framework.config import ParallelConfig
from framework.megatron.rendezvous import open_store
from megatron_bridge.layout import Coords, Layout


@dataclass(frozen=True)
class Mesh:
    """One rank's place. Groups are megatron-core's own."""

    layout: Layout
    coords: Coords
    rank: int
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return self.coords.pp == self.layout.pp - 1

    @property
    def reports(self) -> bool:
        """Whether this rank's figures count: the last stage, once per tensor-parallel group."""
        return self.is_last_stage and self.coords.tp == 0

    @property
    def tp_group(self) -> Any:
        """Ranks that hold the other slices of this rank's tensors."""
        return parallel_state.get_tensor_model_parallel_group()

    def sum_over_cp(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed, in place, over the ranks that hold the other parts of its sequences."""
        if self.layout.cp > 1:
            dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
        return values


def start_mesh(config: ParallelConfig, seed: int) -> Mesh:
    """Join the process group that torchrun's environment describes and build megatron's groups.

    Raises:
        ValueError: torchrun started another number of processes than the layout has ranks.
    """
    if "RANK" not in os.environ:
        raise ValueError("the trainer runs under torchrun; see the commands of cluster=manual")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != config.world_size:
        raise ValueError(
            f"torchrun started {world} processes; parallel.tp * pp * cp * dp = {config.world_size}"
        )
    timeout = datetime.timedelta(seconds=config.timeout_s)

    def join(backend: str) -> None:
        if not dist.is_initialized():
            store = open_store(timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=timeout
            )

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        join("cuda:nccl,cpu:gloo")
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        join("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
        distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
        create_gloo_process_groups=dist.get_backend() != "fake",  # of meta_rank.py
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    layout = config.layout
    coords = layout.coords(rank)
    found = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    expected = (coords.tp, coords.pp, coords.cp, coords.dp, coords.ep, coords.etp)
    assert found == expected, (found, coords)
    return Mesh(layout=layout, coords=coords, rank=rank, device=device)


def stop_mesh() -> None:
    """Leave all groups; every rank calls it at the end of a good run."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
