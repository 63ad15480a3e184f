"""What this machine offers, found without loading torch."""

import os
from pathlib import Path


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs this process may use; empty on a CPU machine."""
    found = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or allowed is None:
        return [str(index) for index in range(len(found))]
    return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1")]
