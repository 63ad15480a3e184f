"""framework.train, with one element of one tensor changed between packing and sending."""

import torch.distributed as dist

TENSOR = "model.layers.1.mlp.down_proj.weight"


def main() -> None:
    """Plant, then train as usual."""
    from framework import train, weight_sync
    from framework.weight_sync import distributed
    from rollout.source import BufferClient

    export = weight_sync.export_buckets
    current = []

    def remembering(*args, **kwargs):
        stream = export(*args, **kwargs)
        advance = type(stream).__next__

        class Remembering(type(stream)):
            def __next__(self):
                current[:] = [advance(self)]
                return current[0]

        stream.__class__ = Remembering
        return stream

    def broadcast(flat, src, group):
        (bucket,) = current
        target = bucket.tensors[list(bucket.names).index(TENSOR)]
        kept = target[3, 5].item()
        target[3, 5] = kept + 1e-6
        dist.broadcast(flat, src=src, group=group)
        target[3, 5] = kept

    class Dist:
        """torch.distributed as weight_sync.distributed sees it."""

        def __getattr__(self, name):
            return broadcast if name == "broadcast" else getattr(dist, name)

    weight_sync.export_buckets, distributed.dist = remembering, Dist()
    # Nobody serves batches in that test: the first push ends the run before it wants one.
    setattr(BufferClient, "restore", lambda self, step, state: None)  # noqa: B010
    train.main()


if __name__ == "__main__":
    main()
