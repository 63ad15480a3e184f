"""The platform SGLang runs on here: plain torch on a CPU, no sgl_kernel, no AMX, no graphs."""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class CpuNativePlatform(CpuDeviceMixin, SRTPlatform):
    """Named by `rollout.server.cpu_plugin.activate`."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """Scaled dot-product attention of torch."""
        return "torch_native"

    def apply_server_args_defaults(self, server_args) -> None:
        """Sample with torch."""
        server_args.sampling_backend = "pytorch"

    def get_dispatch_key_name(self) -> str:
        """Layers take their `forward_native`."""
        return "native"
