"""One rank of any layout, built without its peers and without memory.

The process group is torch's fake one: it has the layout's size and sends nothing. The model stands
on the meta device: shapes, no values. What is proven is that megatron-core accepts the layout for
this rank and that the converter's table knows every parameter that it builds.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from framework.config import RunConfig
from framework.megatron.model import build_chunks, transformer_config
from framework.megatron.parallel import start_mesh, stop_mesh
from megatron_bridge.load import check_model, detect_spec, parameters
from megatron_bridge.mapping import rank_views
from megatron_bridge.models import describe
from megatron_bridge.table_check import check


def build_rank(config: RunConfig, values: dict[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    """Build rank `rank`; returns its parameters' names and shapes, chunk by chunk.

    Ends the process group that it begins, so the process must have none.

    Raises:
        ValueError: the model and the table differ, or the table does not hold the model once.
    """
    layout, multiple = config.parallel.layout, config.model.vocab_pad_multiple
    coords = layout.coords(rank)
    if errors := check(values, layout, multiple):
        raise ValueError("; ".join(errors))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(layout.world_size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        start_mesh(config.parallel, config.seed)
        with torch.device("meta"):
            settings = transformer_config(values, config.model, config.parallel, config.memory)
            chunks = build_chunks(values, settings, multiple)
        views = rank_views(values, layout, coords, detect_spec(chunks), multiple)
        check_model(chunks, views, describe(values).shape.num_layers, layout, coords)
        return {
            f"chunk {chunk}: {name}": tuple(tensor.shape)
            for (chunk, name), tensor in parameters(chunks).items()
        }
    finally:
        stop_mesh()
