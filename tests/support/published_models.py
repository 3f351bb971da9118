"""Tiny random models of every family, as saved by the installed transformers."""

import json
from copy import deepcopy

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

from mlx_moe.training.backend import choose_backend

LIMIT = 1e-5  # for float32 logits, which spread by about 1
SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZE = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 5e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {  # of the 4 pairs of a head, one turns fast enough to be left alone, one is between, two are slowed down
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 24,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=ROPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True)),
    "llama-heads": lambda: LlamaForCausalLM(LlamaConfig(**(SIZE | {"num_key_value_heads": 4, "head_dim": 16}))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=None)),
    "llama-biased-attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True)),
    "llama-linear": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LINEAR)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, rope_parameters=ROPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, rope_parameters=ROPE, head_dim=16)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZE, **EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **QWEN3_EXPERTS, head_dim=16)),
    "granitemoe": lambda: GraniteMoeForCausalLM(
        GraniteMoeConfig(**SIZE, **EXPERTS, attention_multiplier=8**-0.5, attention_bias=True, rope_parameters=LLAMA3)
    ),
    "qwen3_moe-dense-layers": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**(SIZE | {"num_hidden_layers": 5}), **QWEN3_EXPERTS, decoder_sparse_step=2, mlp_only_layers=[3])
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SIZE,
            **EXPERTS,
            shared_intermediate_size=24,
            layer_types=["attention"] * 2,
            position_embedding_type="rope",
            attention_multiplier=8**-0.5,
            mamba_n_heads=1,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZE, bos_token_id=2)),
}


def save(name, folder, dtype=torch.float32, **options):
    """Save a model with rough weights and its config; return the model with the saved weights."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = BUILD[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # no trivial norm, no zero bias
            parameter.add_(torch.randn_like(parameter), alpha=0.1).copy_(parameter.to(dtype))
    deepcopy(model).to(dtype).save_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def logits(model, tokens_BT):
    return model(torch.from_numpy(tokens_BT).long()).logits.numpy()


def our_logits(backend, loaded, tokens_BT):
    return choose_backend(backend).trainer(loaded.config, loaded.weights, device="cpu").logits(tokens_BT)


def random_tokens(n_rows=2):
    return np.random.default_rng(0).integers(0, 96, (n_rows, 24)).astype(np.int32)


def edit_config(folder, **changes):
    """Change keys of config.json; None as a value is written, `...` deletes the key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def save_tokenizer(folder):
    """Save a tokenizer of 96 words, with the usual files beside it."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
