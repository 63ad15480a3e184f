"""What an engine rank does under weight_sync=delta: change its parameters as a directory says.

SGLang's own extension point, `--custom-weight-loader`: /update_weights_from_tensor with this
function's name as load_format calls `load` on every engine rank. The named tensors of such a
request are an order: JSON in the name, nothing in the tensor.

    directory/index.json    version; which version and states it follows (null: none, all content is
                            in it); the state of every rank after it; its entries
    directory/payload       what the entries say, one after another
    entry                   parameter, ranks, form (`delta_codec`), offset, size, checksum of the
                            payload, checksum of the parameter afterwards
    state of a rank         hash of the checksums of all its parameters

A rank answers by a file that the order names: {"wrong": ""}, or why it does not hold this version.
It has no memory but this process's: one that was started again holds no version.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rollout.run_dir import write_atomic
from rollout.server.delta_codec import apply
from rollout.server.derived import refresh_derived

LOADER = "rollout.server.delta.load"
INDEX, PAYLOAD = "index.json", "payload"

logger = logging.getLogger(__name__)


class DeltaError(ValueError):
    """This rank does not hold the version, and why; all content mends it."""


def payload_checksum(content: bytes) -> str:
    """16 bytes of SHA-256 as hex digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def state_of(checksums: Mapping[str, str]) -> str:
    """One hash of a rank's parameters, by name, and their checksums."""
    lines = "".join(f"{name} {checksums[name]}\n" for name in sorted(checksums))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def host_checksum(tensor: torch.Tensor) -> str:
    """SGLang's checksum of a tensor in host memory: 8 bytes of SHA-256 as 16 hex digits."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).digest()[:8].hex()


def _device_checksum(tensor: torch.Tensor) -> str:
    """SGLang's own, on the device that holds the tensor."""
    from sglang.srt.managers.mm_utils import tensor_hash

    return f"{tensor_hash(tensor):016x}"


class Receiver:
    """What one engine rank holds."""

    def __init__(self) -> None:
        self._held: tuple[int, str] | None = None
        """Version and state; None: nobody knows."""
        self._checksums: dict[str, str] = {}

    def take(self, directory: Path, rank: int, parameters: Mapping[str, torch.Tensor]) -> None:
        """Bring the parameters to the version in `directory`; nothing, if they are at it already.

        Raises:
            DeltaError: it follows another version than is held, or is damaged. The parameters are
                then of no version.
            OSError: it cannot be read.
        """
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            follows, state = index["follows"], index["states"][rank]
            before = (follows["version"], follows["states"][rank]) if follows else None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DeltaError(f"{INDEX} is damaged: {error!r}") from None
        if self._held == (index["version"], state) and follows is not None:
            return
        if follows is not None and self._held != before:
            raise DeltaError(f"it follows {_told(before)}, held is {_told(self._held)}")
        checksums = dict(self._checksums) if follows is not None else {}
        self._held, self._checksums = None, {}
        with (directory / PAYLOAD).open("rb") as file:
            for entry in index["entries"]:
                if rank in entry["ranks"]:
                    file.seek(entry["offset"])
                    _change(entry, file.read(entry["size"]), parameters)
                    checksums[entry["parameter"]] = entry["after"]
        if state_of(checksums) != state:
            raise DeltaError("entries are missing: the state after them is another one")
        self._held, self._checksums = (index["version"], state), checksums


def _change(
    entry: Mapping[str, Any], payload: bytes, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Carry out one entry, and see that it led where it should."""
    name = entry["parameter"]
    if payload_checksum(payload) != entry["payload"]:
        raise DeltaError(f"{name}: its payload is damaged")
    if name not in parameters:
        raise DeltaError(f"{name} is no parameter of this engine")
    target = parameters[name].data
    if not target.is_contiguous():
        raise DeltaError(f"{name} is not contiguous in this engine")
    try:
        apply(entry["form"], payload, target)
    except ValueError as error:
        raise DeltaError(f"{name}: {error}") from None
    checksum = _device_checksum if target.is_cuda else host_checksum
    if checksum(target) != entry["after"]:
        raise DeltaError(f"{name} is not what it should be: its base was another one")


def _told(held: tuple[int, str] | None) -> str:
    return "no version" if held is None else f"version {held[0]} in state {held[1][:8]}"


_receiver = Receiver()


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Carry out an order. A failure is answered, not raised: SGLang would die of it."""
    for text, _ in named_tensors:
        carry_out(json.loads(text), _receiver, model)


def carry_out(order: Mapping[str, Any], receiver: Receiver, model: Any) -> None:
    """Take a directory and answer."""
    wrong = ""
    try:
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            receiver.take(Path(order["directory"]), order["rank"], parameters)
            refresh_derived(model)
    except (DeltaError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        logger.warning("weight_sync=delta: %s", error)
        wrong = str(error) or repr(error)
    try:
        write_atomic(Path(order["answer"]), json.dumps({"wrong": wrong}).encode())
    except OSError:
        logger.exception("weight_sync=delta: %s cannot be written", order["answer"])
