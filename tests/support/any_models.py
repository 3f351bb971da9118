"""Tiny random models of families that both libraries support, as saved by the installed transformers."""

import torch
import transformers
from transformers.utils import logging

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "llama": ("Llama", SIZE),
    "llama-theta": ("Llama", SIZE | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen2_moe-theta": (
        "Qwen2Moe",
        SIZE
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        },
    ),
    "mistral-window": ("Mistral", SIZE | {"sliding_window": 8}),
    "mixtral": ("Mixtral", SIZE | {"num_local_experts": 4}),
    "mixtral-window": ("Mixtral", SIZE | {"num_local_experts": 4, "sliding_window": 8}),
    "olmoe": ("Olmoe", SIZE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", SIZE | EXPERTS | {"head_dim": 8}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def save(name, folder):
    """Save a model with rough weights: no trivial norm, no zero bias."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    family, fields = MODELS[name]
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(getattr(transformers, f"{family}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    logging.set_verbosity(verbosity)
    return folder
