"""Writing a Hugging Face directory, tensor by tensor, in bounded memory.

Every name, type and shape is known beforehand: each file's header is written first and the tensors
are appended in that order. The directory appears under its name only when it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_bridge.hf_checkpoint import DTYPE_NAMES, INDEX, SINGLE, read_config
from megatron_bridge.views import Index

COPIED_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model", ".tiktoken"})
"""Files of a checkpoint that are no weights: configuration, tokenizer, generation defaults."""

Entry = tuple[str, torch.dtype, Index]
"""Name, type and shape of a tensor to come."""
File = tuple[str, list[Entry]]
"""A file's name and its tensors in order."""
WRITTEN_DTYPES = DTYPE_NAMES | {torch.float8_e4m3fn: "F8_E4M3"}
"""Types that are written, by safetensors' names; fp8 is not read."""
_SOURCE = ".source"
"""In an unfinished directory: what its complete files were written from."""
_UNFINISHED = ".writing"
"""Suffix of a file that is being written."""


class HfWriter:
    """One directory while it is written: `add` every tensor in order, then `finish`.

    Until `finish` everything lies in a hidden directory beside the target; `abort` removes it, and
    so does the next writer of the same target if the process was killed, unless it is to go on.

    resume: names the source of the tensors. What a killed writer with the same entries and the
    same name left, its complete files, is kept; `names` are the tensors that are still to come.
    """

    def __init__(
        self,
        out_dir: str | Path,
        entries: Sequence[Entry],
        like: str | Path,
        max_file_bytes: int = 4 << 30,
        *,
        resume: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """config: written as config.json in place of that of `like`."""
        self.path = Path(out_dir).absolute()
        check_free(self.path)
        config = read_config(like) if config is None else config
        self._partial = partial_dir(self.path)
        files = _name_files(_split(entries, max_file_bytes))
        kept = _keep_complete(self._partial, files, resume)
        self._pending = [each for each in reversed(files) if each[0] not in kept]
        self.names = [entry[0] for name, held in files if name not in kept for entry in held]
        """The tensors to add, in order."""
        self.kept_files = len(kept)
        """Files that an earlier writer had completed."""
        self._weight_map = {entry[0]: name for name, held in files for entry in held}
        self._total_bytes = sum(map(_size_bytes, entries))
        self._writing: Path | None = None
        self._file: BinaryIO | None = None
        self._expected: list[Entry] = []
        try:
            _copy_companions(Path(like), self._partial, config, entries)
        except OSError:
            self.abort()
            raise

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor; it must be the next of the entries."""
        if not self._expected:
            self._next_file()
        wanted = self._expected.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != wanted:
            raise ValueError(
                f"tensor {name} {tensor.dtype} {tuple(tensor.shape)} came where "
                f"{wanted[0]} {wanted[1]} {wanted[2]} was due"
            )
        assert self._file is not None
        content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._file.write(content.numpy().data)

    def finish(self) -> None:
        """Close the last file, write the index and give the directory its name."""
        self._close_file()
        if self._pending:
            raise ValueError(f"{self.path}: {len(self._pending)} files were never written")
        if len(set(self._weight_map.values())) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": self._weight_map,
            }
            (self._partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (self._partial / _SOURCE).unlink(missing_ok=True)
        give_name(self._partial, self.path)

    def abort(self) -> None:
        """Remove what was written so far."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def _next_file(self) -> None:
        self._close_file()
        if not self._pending:
            raise ValueError(f"{self.path}: more tensors came than were announced")
        name, entries = self._pending.pop()
        self._writing = self._partial / name
        self._file = self._writing.with_suffix(_UNFINISHED).open("wb")
        self._file.write(_header(entries))
        self._expected = list(reversed(entries))

    def _close_file(self) -> None:
        if self._expected:
            raise ValueError(f"{self.path}: tensor {self._expected[-1][0]} never came")
        if self._file is not None and self._writing is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._writing.with_suffix(_UNFINISHED).rename(self._writing)


def check_free(path: Path) -> None:
    """ValueError unless `path` is free for a directory to appear at: absent, or an empty one."""
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise ValueError(f"{path} exists already; nothing is overwritten")


def partial_dir(path: Path) -> Path:
    """Where a directory lies while it is written: hidden, beside `path`."""
    return path.with_name(f".{path.name}.partial")


def give_name(partial: Path, path: Path) -> None:
    """A complete directory gets its name, durably."""
    sync_directory(partial)
    partial.rename(path)
    sync_directory(path.parent)


def _keep_complete(partial: Path, files: Sequence[File], source: str) -> set[str]:
    """Make `partial` hold nothing but complete files of the same tensors from the same source."""
    layout = [(name, [(e[0], str(e[1]), e[2]) for e in held]) for name, held in files]
    mark = hashlib.sha256(f"{source}\n{layout}".encode()).hexdigest()
    marked = partial / _SOURCE
    kept: set[str] = set()
    if source and marked.is_file() and marked.read_text(encoding="utf-8") == mark:
        kept = {name for name, _ in files if (partial / name).is_file()}
    partial.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        if file.name not in kept:
            file.unlink()
    if source:
        marked.write_text(mark, encoding="utf-8")
    return kept


def _size_bytes(entry: Entry) -> int:
    return entry[1].itemsize * torch.Size(entry[2]).numel()


def _split(entries: Sequence[Entry], max_file_bytes: int) -> list[list[Entry]]:
    """The entries in order, cut into files of at most `max_file_bytes` (a larger tensor alone)."""
    files: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = _size_bytes(entry)
        if not files or size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(entry)
        room -= size
    return files


def _name_files(files: Sequence[list[Entry]]) -> list[File]:
    """Hugging Face's names for one file, or for several."""
    if len(files) == 1:
        return [(SINGLE, files[0])]
    return [
        (f"model-{number:05d}-of-{len(files):05d}.safetensors", entries)
        for number, entries in enumerate(files, 1)
    ]


def _header(entries: Sequence[Entry]) -> bytes:
    """A safetensors header: its length, then JSON, padded so that tensors start aligned."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + _size_bytes(entry)
        content[entry[0]] = {
            "dtype": WRITTEN_DTYPES[entry[1]],
            "shape": list(entry[2]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy_companions(
    like: Path, out: Path, config: Mapping[str, Any], entries: Sequence[Entry]
) -> None:
    """Tokenizer, generation and other small files as they are; config.json too where it is that of
    `like` and of this type, else written."""
    for file in sorted(like.iterdir()):
        if (
            file.is_file()
            and file.suffix in COPIED_SUFFIXES
            and file.name
            not in {
                INDEX,
                "config.json",
            }
        ):
            shutil.copyfile(file, out / file.name)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    dtype = str(entries[0][1]).removeprefix("torch.")
    if config.get(key) == dtype and config == read_config(like):
        shutil.copyfile(like / "config.json", out / "config.json")
        return
    text = json.dumps({**config, key: dtype}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def sync_directory(directory: Path) -> None:
    """Make renames and new files of a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
