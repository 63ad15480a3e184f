"""Reading megatron-core's torch_dist checkpoints without megatron-core, a tensor at a time.

Their tensors are whole and named alike under every layout and both layer specs: global layer and
expert numbers, Transformer Engine's names for fused norms, gate and up apart (`_w`, `_v`). Views
of those names in Hugging Face coordinates come from the same tables as everything else.
"""

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_bridge.hf_checkpoint import DTYPE_NAMES, read_config
from megatron_bridge.layout import Layout
from megatron_bridge.load import ADAPTER, model_differences
from megatron_bridge.mapping import model_shapes, rank_views
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.models.mtp import without_mtp
from megatron_bridge.views import Box, Index, View, tiling_errors, window

METADATA = ".metadata"
"""What megatron-core writes last: a checkpoint without it is not complete."""
VOCABULARY = frozenset({"embedding.word_embeddings.weight", "output_layer.weight"})
"""Tensors that may end in padding rows, all zero."""
_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
_GATED = "linear_fc1.weight"


def is_torch_dist(path: str | Path) -> bool:
    """Whether `path` is a torch_dist checkpoint, from its files' names."""
    return (Path(path) / METADATA).is_file()


def stored_views(hf_config: Mapping[str, Any]) -> dict[str, View]:
    """Name in a torch_dist checkpoint -> view of the whole tensor, its vocabulary not padded."""
    whole = Layout()
    stored: dict[str, View] = {}
    for (_, name), view in rank_views(hf_config, whole, whole.coords(0), Spec.TE, 1).items():
        name = _EXPERT.sub(r".experts.experts.\2.\1.weight", name)
        name = name.replace(".mtp_model_layer.", ".transformer_layer.")  # its name of old
        if name.endswith(_GATED):
            half = view.shape[0] // 2
            stored[f"{name}_w"] = window(view, 0, 0, half)
            stored[f"{name}_v"] = window(view, 0, half, 2 * half)
        else:
            stored[name] = view
    return stored


OTHERS = ("optimizer.", "critic.")
"""What names begin with that are not the model's."""
MTP = "mtp."
"""What those of multi-token prediction begin with."""


class TorchDistCheckpoint:
    """A checkpoint's model tensors; optimizer, generators and critic in it are left alone.

    Opening reads the metadata and compares the sizes of the files with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = FileSystemReader(self.path)
        self._metadata = self._read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(OTHERS)
        }
        """Name -> global shape, type and stored parts."""
        self.has_mtp = any(name.startswith(MTP) for name in self.tensors)
        """It holds multi-token prediction layers."""

    @property
    def fingerprint(self) -> str:
        """Differs between any two checkpoints: each save writes an id of its own."""
        return hashlib.sha256((self.path / METADATA).read_bytes()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in the type it was saved in, on the CPU."""
        entry = self.tensors[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def errors(self, hf_config: Mapping[str, Any]) -> list[str]:
        """Why this is not a checkpoint of that model: every tensor missing, extra or misshapen.

        Multi-token prediction layers may be in it that the model has not.
        What `to-megatron` wrote has a config.json, which must tell of the same computation.
        """
        if any(f".{ADAPTER}." in name for name in self.tensors):
            return ["it holds low-rank adapters and no whole model; its run's hf/ has both in one"]
        views, model = stored_views(hf_config), describe(hf_config)
        if (self.path / "config.json").exists():
            saved = read_config(self.path)
            saved = saved if model.shape.mtp_layers else without_mtp(saved)
            differences = model_differences(describe(saved), model)
            if differences:
                return differences
        errors = [f"tensor {name} is missing" for name in views.keys() - self.tensors.keys()]
        for name, entry in self.tensors.items():
            if name.startswith(MTP) and not model.shape.mtp_layers:
                continue
            if name not in views:
                errors.append(f"tensor {name} is not one of {model.architecture.name}")
                continue
            shape, wanted = tuple(entry.size), views[name].shape
            padded = name in VOCABULARY and shape[0] > wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not padded:
                errors.append(f"tensor {name} has shape {shape}, expected {wanted}")
            if entry.properties.dtype not in DTYPE_NAMES:
                errors.append(f"tensor {name} has type {entry.properties.dtype}, not a float's")
            parts = [(tuple(part.offsets), tuple(part.sizes)) for part in entry.chunks]
            errors += tiling_errors(name, shape, parts)
        return sorted(errors)

    def _read_metadata(self) -> Metadata:
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a directory with a checkpoint")
        if not is_torch_dist(self.path):
            found = sorted(self.path.glob(f"**/step_*/{METADATA}"))
            hint = f"; it holds {found[-1].parent}" if found else ""
            raise ValueError(f"{self.path} holds no {METADATA}: not a complete checkpoint{hint}")
        try:
            metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{self.path / METADATA} cannot be read: {error}") from None
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise ValueError(f"{self.path / METADATA} is not that of a torch_dist checkpoint")
        return metadata

    def _check_files(self) -> None:
        """Every file must reach as far as the metadata says."""
        ends: dict[str, int] = {}
        for part in self._metadata.storage_data.values():
            end = part.offset + part.length
            ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
        errors = []
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                errors.append(f"{file} is missing")
            elif file.stat().st_size < end:
                errors.append(f"{file} has {file.stat().st_size} bytes, not {end}: cut off?")
        if errors:
            raise ValueError("\n".join(errors))


class HfTensors:
    """A checkpoint in Hugging Face form: types and shapes at once, contents one at a time.

    Raises:
        ValueError: it is not one of this model; the message lists every tensor that is wrong.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint, hf_config: Mapping[str, Any]) -> None:
        if errors := checkpoint.errors(hf_config):
            lines = "\n".join(errors)
            raise ValueError(f"{checkpoint.path} does not fit config.json:\n{lines}")
        self._checkpoint = checkpoint
        self._views = stored_views(hf_config)
        self._shapes = model_shapes(describe(hf_config))
        self._sources: dict[str, list[tuple[str, Box]]] = {}
        for stored, view in self._views.items():
            for box in view.boxes:
                self._sources.setdefault(box.name, []).append((stored, box))
        self._held = ("", torch.empty(0))

    def entries(self) -> Iterator[tuple[str, torch.dtype, Index]]:
        """Name, type and shape of every tensor, in the order of the model."""
        for name, shape in self._shapes.items():
            stored, _ = self._sources[name][0]
            yield name, self._checkpoint.tensors[stored].properties.dtype, shape

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor. Fastest in the order of `entries`: neighbours share what was read."""
        sources = self._sources[name]
        if len(sources) == 1 and sources[0][1].size == self._shapes[name]:
            stored, box = sources[0]
            return self._read(stored)[box.local]
        tensor = torch.empty(self._shapes[name], dtype=self._read(sources[0][0]).dtype)
        for stored, box in sources:
            tensor[box.source] = self._read(stored)[box.local]
        return tensor

    def _read(self, stored: str) -> torch.Tensor:
        if self._held[0] != stored:
            self._held = ("", torch.empty(0))  # never two at a time
            tensor = self._checkpoint.read(stored)
            if stored in VOCABULARY and tensor[self._views[stored].shape[0] :].any():
                raise ValueError(
                    f"{self._checkpoint.path}: {stored} holds values beyond vocab_size = "
                    f"{self._views[stored].shape[0]}; the vocabulary of config.json is too small"
                )
            self._held = (stored, tensor)
        return self._held[1]
