"""Hugging Face -> a torch_dist checkpoint of the model's weights, a part of a tensor at a time.

torch's own writer makes the files; a planner hands it each part when its turn comes, read from the
safetensors then. Tensors are cut into parts by rows, so that a rank that loads a slice reads little
besides.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_bridge.hf_checkpoint import DTYPES, HfCheckpoint
from megatron_bridge.torch_dist import stored_views
from megatron_bridge.views import View, copy_in, window

PART_BYTES = 64 << 20
_COMMON = "common_state/shard_0_1"
"""Where megatron-core 0.19 looks for what is no tensor."""
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


class TorchDistWriter(DefaultSavePlanner):
    """What is written of a checked `checkpoint`, and the content of each part when it is due.

    advance: is told the bytes of every part that was read.

    Raises:
        ValueError: tensors that Megatron makes one of have several types; all are listed.
    """

    def __init__(
        self, checkpoint: HfCheckpoint, advance: Callable[[int], None] = lambda size: None
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._checkpoint, self._advance = checkpoint, advance
        self._views = stored_views(checkpoint.config)
        self._dtypes = stored_dtypes(checkpoint, self._views)
        self._written = torch.empty(0)

    def write(self, directory: Path, max_file_bytes: int) -> None:
        """Write everything into `directory`, an empty one.

        The metadata comes last: what a killed writer leaves is not taken for a checkpoint.
        """
        writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        writer.set_up_storage_writer(True)
        # torch names a file after the rank that writes it: we play as many as there are files.
        plans, metadata = self.create_global_plan(list(self.plans(max_file_bytes)))
        plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
        results = [writer.write_data(plan, self).wait() for plan in plans]
        (directory / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
        writer.finish(metadata, results)

    def plans(self, max_file_bytes: int) -> Iterator[SavePlan]:
        """One a file."""
        common = WriteItem(MetadataIndex(_COMMON), WriteItemType.BYTE_IO)
        items, filled = [common], 0
        for name, view in self._views.items():
            row = prod(view.shape[1:]) * self._dtypes[name].itemsize
            step = max(1, PART_BYTES // row)
            for start in range(0, view.shape[0], step):
                rows = min(step, view.shape[0] - start)
                if filled and filled + rows * row > max_file_bytes:
                    yield SavePlan(items)
                    items, filled = [], 0
                items.append(self._part(name, start, rows))
                filled += rows * row
        yield SavePlan(items)

    def _part(self, name: str, start: int, rows: int) -> WriteItem:
        shape = self._views[name].shape
        offsets = torch.Size((start, *(0 for _ in shape[1:])))
        return WriteItem(
            MetadataIndex(name, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size((rows, *shape[1:]))),
                properties=TensorProperties(dtype=self._dtypes[name]),
                size=torch.Size(shape),
            ),
        )

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """torch's writer asks for each item when it writes it."""
        data = write_item.tensor_data
        if data is None:
            common = io.BytesIO()
            torch.save([{"content_metadata": {"format": "drivetrain"}}], common)
            return common
        self._written.untyped_storage().resize_(0)  # torch's writer keeps every tensor of a file
        name, start = write_item.index.fqn, data.chunk.offsets[0]
        view = window(self._views[name], 0, start, start + data.chunk.sizes[0])
        part = torch.empty(view.shape, dtype=self._dtypes[name])
        copy_in(view, self._checkpoint.read, part)
        self._advance(part.nbytes)
        self._written = part
        return part


def stored_dtypes(checkpoint: HfCheckpoint, views: Mapping[str, View]) -> dict[str, torch.dtype]:
    """Type of each stored tensor: that of the Hugging Face tensors it is made of.

    Raises:
        ValueError: they have several; every such tensor is listed.
    """
    dtypes: dict[str, torch.dtype] = {}
    errors = []
    for name, view in views.items():
        found = {box.name: checkpoint.tensors[box.name].dtype for box in view.boxes}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{each} {dtype}" for each, dtype in sorted(found.items()))
            errors.append(f"{told}: one tensor in Megatron ({name}), so they need one type")
        dtypes[name] = DTYPES[next(iter(found.values()))]
    if errors:
        raise ValueError(f"{checkpoint.path} cannot be converted:\n" + "\n".join(errors))
    return dtypes
