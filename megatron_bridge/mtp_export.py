"""What a Hugging Face directory has of multi-token prediction besides what is exported.

built     such layers are in the model and in its export; on disk they repeat the embedding and
          the output layer, so those are written again under the copies' names
carried   the model has none: those of a source directory go on into the new one, bit for bit;
          copies that were equal to what they repeat are written from what is exported
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_bridge.fp8 import Tensors
from megatron_bridge.hf_checkpoint import DTYPES, INDEX, SINGLE, HfCheckpoint
from megatron_bridge.hf_writer import Entry
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import ModelDescription
from megatron_bridge.models.mtp import mtp_copies
from megatron_bridge.views import Box, ref, window

STRIP_BYTES = 64 << 20


class MtpTensors:
    """For an export of `model`; close it after the last `read`.

    source: a directory whose layers are carried, and whose copies are written; it may hold no
    weights. Then a model with such layers gets every copy, as the hub's have them.
    """

    def __init__(self, model: ModelDescription, source: str | Path) -> None:
        self.source = Path(source)
        self.copies: dict[str, list[str]] = {}
        """Exported tensor -> names that it is written under as well."""
        self.carried: list[str] = []
        """Tensors of the source, to be written after the exported ones."""
        self._files = ExitStack()
        self._checkpoint: HfCheckpoint | None = None
        if any((self.source / name).exists() for name in (SINGLE, INDEX)):
            self._checkpoint = self._files.enter_context(HfCheckpoint(self.source))
        held = self._checkpoint.mtp_names if self._checkpoint is not None else []
        if model.shape.mtp_layers:
            for copy, original in mtp_copies(model.shape).items():
                if not held or copy in held:
                    self.copies.setdefault(original, []).append(copy)
        elif held:
            self._carry(model, held)

    def close(self) -> None:
        """Unmap the source."""
        self._files.close()

    def entries(self, exported: Iterable[Entry]) -> Iterator[Entry]:
        """Everything that is written, in order."""
        for name, dtype, shape in exported:
            yield name, dtype, shape
            for copy in self.copies.get(name, ()):
                yield copy, dtype, shape
        for name in self.carried:
            info = self._opened.tensors[name]
            yield name, DTYPES[info.dtype], info.shape

    def read(self, name: str) -> torch.Tensor:
        """A carried tensor."""
        return self._opened.read(ref(name, self._opened.shapes[name]).boxes[0])

    @property
    def _opened(self) -> HfCheckpoint:
        assert self._checkpoint is not None
        return self._checkpoint

    def _carry(self, model: ModelDescription, held: list[str]) -> None:
        theirs = describe(self._opened.config)
        if theirs.architecture.name != model.architecture.name:
            return  # a scalar head has no use for them
        copies = mtp_copies(theirs.shape)
        for name in held:
            original = copies.get(name)
            if original is not None and self._equal(name, original):
                self.copies.setdefault(original, []).append(name)
            else:
                self.carried.append(name)

    def _equal(self, name: str, other: str) -> bool:
        """Whether two tensors of the source are, a strip at a time."""
        shapes = self._opened.shapes
        if shapes[name] != shapes.get(other):
            return False
        rows = shapes[name][0]
        step = max(1, STRIP_BYTES * rows // max(1, self._opened.size_bytes(name)))
        for start in range(0, rows, step):
            strip = window(ref(name, shapes[name]), 0, start, min(rows, start + step))
            box: Box = strip.boxes[0]
            mine, theirs = self._opened.read(box), self._opened.read(box._replace(name=other))
            if not torch.equal(mine, theirs):
                return False
        return True


def mtp_source(*hf_dirs: str) -> Path:
    """The first of several directories that holds MTP layers; the last where none does."""
    for path in map(Path, filter(None, hf_dirs)):
        if any((path / name).exists() for name in (SINGLE, INDEX)):
            with HfCheckpoint(path) as checkpoint:
                if checkpoint.mtp_names:
                    return path
    return Path(hf_dirs[-1])


class WithMtp:
    """The tensors of a model with those of `mtp`; read one at a time."""

    def __init__(self, tensors: Tensors, mtp: MtpTensors) -> None:
        self._tensors, self._mtp = tensors, mtp
        self._originals = {copy: name for name, copies in mtp.copies.items() for copy in copies}
        self._carried = frozenset(mtp.carried)

    def entries(self) -> Iterator[Entry]:
        """Name, type and shape of every tensor."""
        return self._mtp.entries(self._tensors.entries())

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        if name in self._carried:
            return self._mtp.read(name)
        return self._tensors.read(self._originals.get(name, name))
