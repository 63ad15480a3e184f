"""Weights to the engines through a directory that both sides see: no group, any network."""

from collections.abc import Iterable

from framework.weight_sync.directory import DirectoryTransport
from framework.weight_sync.engines import Engines
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket
from megatron_bridge.hf_writer import HfWriter

MAX_FILE_BYTES = 4 << 30


class DiskPush(DirectoryTransport):
    """Every version is a Hugging Face directory, which SGLang loads."""

    _size = 0
    """Bytes of weights in the directory that was prepared."""

    def prepare(
        self, version: int, buckets: Iterable[Bucket], verifier: ExpectedChecksums | None
    ) -> None:
        """Write the directory."""
        context, self._size = self.context, 0
        writer = HfWriter(
            self.new_directory(version), context.plan.entries, context.like, MAX_FILE_BYTES
        )
        for bucket in buckets:
            self._size += bucket.flat.nbytes
            if verifier is not None:
                verifier.add(bucket)
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                writer.add(name, tensor)
        writer.finish()

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        context, directory = self.context, self.directory(version)
        engines.in_doubt = True
        engines.post(
            "/update_weights_from_disk",
            {
                "model_path": str(directory),
                "abort_all_requests": False,
                "weight_version": str(version),
                "flush_cache": context.flush_cache,
            },
        )
        self.drop_others(directory)
        return self._size
