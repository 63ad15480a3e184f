"""Reading a Hugging Face directory: config.json, safetensors headers, and slices of the tensors.

Opening parses headers only and refuses files that are cut off or do not fit their index; tensor
bytes are read box by box, so that each rank touches only what it holds: whole rows straight into
the tensor that they are for, other boxes through a mapping.
"""

import ctypes
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_bridge.models.mtp import mtp_prefixes, without_mtp
from megatron_bridge.views import Box, Index

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that are read and written; quantised ones are refused."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: Index
    start: int
    """First byte, from the beginning of the file."""


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    return _read_json(Path(hf_dir) / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


class HfCheckpoint:
    """The weights of a Hugging Face directory. Opening reads headers; `read` maps the files.

    mtp: False leaves multi-token prediction layers out: `config` is that of the model without them.
    So it is where the files hold none, whatever config.json says (transformers saves it unchanged).
    """

    def __init__(self, hf_dir: str | Path, *, mtp: bool = True) -> None:
        self.path = Path(hf_dir)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a directory with a Hugging Face model")
        self.config = read_config(self.path)
        self.tensors = self._read_headers()
        prefixes = mtp_prefixes(self.config)
        self.mtp_names = [n for n in self.tensors if prefixes and n.startswith(prefixes)]
        """Tensors of multi-token prediction layers, left out or not."""
        if not (mtp and self.mtp_names):
            self.config = without_mtp(self.config)
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "HfCheckpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()
        self._open.clear()
        self._descriptors.clear()

    @property
    def shapes(self) -> dict[str, Index]:
        """Name -> shape of every tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    def size_bytes(self, name: str) -> int:
        """Bytes of a tensor of one of DTYPES."""
        info = self.tensors[name]
        return prod(info.shape) * DTYPES[info.dtype].itemsize

    def read(self, box: Box) -> torch.Tensor:
        """The content of a box, in the file's type; only its bytes are read."""
        file = self._file(self.tensors[box.name].file)
        return file.get_slice(box.name)[box.source] if box.source else file.get_tensor(box.name)

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        """Put the content of a box into `out`, which has its size, cast to its type."""
        info = self.tensors[box.name]
        whole_rows = bool(box.size) and box.size[1:] == info.shape[1:]
        alike = out.device.type == "cpu" and out.dtype is DTYPES[info.dtype]
        if not (whole_rows and alike and out.is_contiguous()):
            out.copy_(self.read(box))
            return
        self._file(info.file)  # which checks the header
        if info.file not in self._descriptors:
            descriptor = os.open(self.path / info.file, os.O_RDONLY)
            self._files.callback(os.close, descriptor)
            self._descriptors[info.file] = descriptor
        # Not out.numpy(): that makes the storage one that can never be resized (offloading does).
        size = out.numel() * out.element_size()
        memory = memoryview((ctypes.c_char * size).from_address(out.data_ptr())).cast("B")
        row_bytes = prod(info.shape[1:]) * out.element_size()
        at, read = info.start + box.start[0] * row_bytes, 0
        while read < len(memory):  # Linux reads 2 GB at a time
            count = os.preadv(self._descriptors[info.file], [memory[read:]], at + read)
            if not count:
                raise ValueError(f"{self.path / info.file} ends before tensor {box.name} does")
            read += count

    def _file(self, name: str) -> Any:
        """The mapped file, opened when it is first needed."""
        if name not in self._open:
            path = self.path / name
            try:
                opened = safe_open(str(path), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
            self._open[name] = self._files.enter_context(opened)
        return self._open[name]

    def _read_headers(self) -> dict[str, TensorInfo]:
        single, index = self.path / SINGLE, self.path / INDEX
        if single.exists() and index.exists():
            raise ValueError(f"{self.path} holds both {SINGLE} and {INDEX}; remove the stale one")
        if single.exists():
            return _read_header(single)
        if not index.exists():
            raise ValueError(f"{self.path} holds neither {SINGLE} nor {INDEX}")
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing or empty")
        tensors: dict[str, TensorInfo] = {}
        errors = []
        for file in sorted(set(map(str, weight_map.values()))):
            if Path(file).name != file or not (self.path / file).is_file():
                errors.append(f"{index}: file {file!r} is not in the directory")
                continue
            for name, info in _read_header(self.path / file).items():
                if weight_map.get(name) != file:
                    errors.append(f"{file}: tensor {name} is not listed there by {INDEX}")
                tensors[name] = info
        errors += [
            f"{index}: tensor {n} is in no file" for n in sorted(weight_map.keys() - tensors)
        ]
        if errors:
            raise ValueError("\n".join(errors))
        return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> info from one safetensors file, whose length must be what the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is not a safetensors file, or it was cut off")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"{path}: the safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is not an object")
    end = 0
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            info = TensorInfo(path.name, str(entry["dtype"]), shape, 8 + length + start)
            end = max(end, stop)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(f"{path}: the header's entry of {name} is malformed") from None
        tensors[name] = info
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size} bytes, its header says {8 + length + end}: cut off?")
    return tensors
