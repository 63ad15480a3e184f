"""A policy for machines without a model hub: a random tiny Qwen3, dense or MoE, and its tokenizer.

Written as an ordinary Hugging Face directory, so that everything downstream takes its usual path.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from framework.config import TinyModelConfig

CHARACTERS = "0123456789+-*/=()<>[]{}:;,.?!#|&^%@$_~ \n" + "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<bos>", "<eos>")
# Messages verbatim: a prompt of the bundled tasks is its own format, and every token counts here.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def create_tiny_model(config: TinyModelConfig, path: str | Path) -> None:
    """Write config.json, safetensors and tokenizer to `path`; the same config, the same bytes.

    A directory that was written for the same config is kept.

    Raises:
        ValueError: `path` holds something else.
    """
    path = Path(path)
    wanted = hashlib.sha256(repr(config).encode()).hexdigest()
    stamp = path / "tiny_model.json"
    if stamp.exists():
        if json.loads(stamp.read_text())["config_sha256"] == wanted:
            return
        raise ValueError(f"{path} holds a tiny model of another model.tiny; remove it")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not a tiny model; choose another run_dir")

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = _tokenizer()
    experts: dict[str, Any] = {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.ffn_size,
        "norm_topk_prob": True,
    }
    make_config: Any = Qwen3MoeConfig if config.num_experts else Qwen3Config
    hf_config = make_config(
        **(experts if config.num_experts else {}),
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=config.tied,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        initializer_range=0.02,
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.init_seed)
        model = (Qwen3MoeForCausalLM if config.num_experts else Qwen3ForCausalLM)(hf_config)
        # Residual outputs start smaller, so that depth does not grow the stream (GPT-2's rule).
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.data.mul_((2 * config.num_layers) ** -0.5)
    model.float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    stamp.write_text(json.dumps({"config_sha256": wanted}))


def tiny_vocabulary() -> dict[str, int]:
    """Token -> id."""
    return {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}


def _tokenizer():
    """One token a character; characters outside the alphabet become <pad>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(tiny_vocabulary(), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
