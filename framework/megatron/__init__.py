"""All that touches megatron-core: layout, model, packed batches, forward, backward, step.

Importing this package prepares megatron-core for the machine (see `cpu`): that has to happen before
megatron.core is first imported, so it cannot wait for a call.
"""

from framework.megatron import cpu

cpu.install()
