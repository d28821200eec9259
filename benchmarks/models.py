"""Models of random weights, as benchmarks need them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB = 4096


def described(d_model: int, n_layers: int) -> dict[str, int]:
    """What the configurations of a Llama and of a Mixtral have in common."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": max(1, d_model // 64),
        "num_key_value_heads": max(1, d_model // 256),
    }


def llama(d_model: int, n_layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """With FFNs four times as wide as the model."""
    torch.manual_seed(0)
    config = LlamaConfig(**described(d_model, n_layers), intermediate_size=4 * d_model)
    return LlamaForCausalLM(config).to(dtype).eval()
