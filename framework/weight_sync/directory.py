"""What transports through a directory share: one directory a version, of which one stays."""

import shutil
from pathlib import Path

from framework.weight_sync.base import PushContext, Transport
from framework.weight_sync.engines import Engines


class DirectoryTransport(Transport):
    """Rank 0 writes run_dir/weights/version_<n>; the engines read it; the one before is deleted."""

    prepares = True

    def __init__(self, context: PushContext) -> None:
        self.context = context

    def directory(self, version: int) -> Path:
        """Where this version lies."""
        return self.context.scratch_dir / f"version_{version}"

    def new_directory(self, version: int) -> Path:
        """Of this version; what an earlier try or a killed trainer left there is gone."""
        directory = self.directory(version)
        shutil.rmtree(directory, ignore_errors=True)
        return directory

    def drop_others(self, directory: Path) -> None:
        """Every engine has what is in this one."""
        for older in self.context.scratch_dir.iterdir():
            if older != directory:
                shutil.rmtree(older)

    def close(self, engines: Engines) -> None:
        """Delete what was written for the engines."""
        shutil.rmtree(self.context.scratch_dir, ignore_errors=True)
