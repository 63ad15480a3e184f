"""mbridge's load and export of the same model, for scripts/benchmarks/weights.py.

mbridge 0.15.1 cannot build the model here: `get_model` reads `rope_theta` of the config, which
transformers 5 does not have (AttributeError), and then asks for Transformer Engine, which needs a
GPU. Its `load_weights` and `export_weights` take any megatron-core model, so they are given ours,
and told how far its vocabulary is padded, which `get_model` would have noted. The names of the
norms, which Transformer Engine fuses into linears and torch does not, are added as mbridge adds
models: by a subclass with more rows in its name tables.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

INPUT_NORM = "model.layers.{layer_number}.input_layernorm.weight"
POST_NORM = "model.layers.{layer_number}.post_attention_layernorm.weight"


def torch_spec_bridge(hf_dir: Path, padded_vocab_size: int) -> Any:
    """mbridge's Qwen3 with names for norms that are modules of their own."""
    from mbridge.models.qwen3 import Qwen3Bridge  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig

    class TorchSpecQwen3(Qwen3Bridge):
        _MLP_MAPPING = {  # noqa: RUF012  # as upstream declares it
            **Qwen3Bridge._MLP_MAPPING,
            "pre_mlp_layernorm.weight": [POST_NORM],
        }
        _OTHER_MAPPING = {  # noqa: RUF012
            **Qwen3Bridge._OTHER_MAPPING,
            "input_layernorm.weight": [INPUT_NORM],
        }

    config = AutoConfig.from_pretrained(str(hf_dir))
    bridge = TorchSpecQwen3(config, make_vocab_size_divisible_by=padded_vocab_size)
    bridge.vocab_size, bridge.padded_vocab_size = config.vocab_size, padded_vocab_size
    return bridge


def actions(
    hf_dir: Path, chunks: list[Any], size: int, truth: dict[str, Any]
) -> dict[str, Callable[[], None]]:
    """What is timed, by name; once before that everything is compared with the files.

    truth: the tensors of `hf_dir`.

    Raises:
        AssertionError: mbridge exports other tensors than it was given.
    """
    import torch

    bridge = torch_spec_bridge(hf_dir, chunks[0].vocab_size)

    def load() -> None:
        bridge.load_weights(chunks, str(hf_dir))

    def export() -> None:
        assert sum(tensor.nbytes for _, tensor in bridge.export_weights(chunks)) == size

    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(torch.nan)
    load()
    found = dict(bridge.export_weights(chunks))
    wrong = sorted(found.keys() ^ truth.keys())
    bits = torch.int16  # NaNs compare too
    wrong += [n for n in found.keys() & truth if not found[n].view(bits).equal(truth[n].view(bits))]
    assert not wrong, f"mbridge exports {wrong} otherwise"
    return {"mbridge load": load, "mbridge export": export}
