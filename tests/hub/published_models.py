"""Tiny random models of every family, as the installed transformers saves them."""

import json
from copy import deepcopy

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from mlx_moe.config import OptimizerConfig
from mlx_moe.training.backend import choose_backend

LIMIT = 1e-5  # of float32 logits, which spread by about 1
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
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=ROPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True)),
    "llama-heads": lambda: LlamaForCausalLM(LlamaConfig(**(SIZE | {"num_key_value_heads": 4, "head_dim": 16}))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=None)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZE, bos_token_id=2)),
}


def save(name, folder, dtype=torch.float32, **options):
    """Save a model with rough weights, its config beside it; the model, with the weights that were saved."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = BUILD[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no norm is trivial and no bias 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1).copy_(parameter.to(dtype))
    deepcopy(model).to(dtype).save_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def logits(model, tokens_BT):
    return model(torch.from_numpy(tokens_BT).long()).logits.numpy()


def our_logits(backend, loaded, tokens_BT):
    return choose_backend(backend).trainer(loaded.config, OptimizerConfig(), loaded.weights, "cpu").logits(tokens_BT)


def random_tokens(n_rows=2):
    return np.random.default_rng(0).integers(0, 96, (n_rows, 24)).astype(np.int32)


def edit_config(folder, **changes):
    """Change keys of config.json; None as a value is written, `...` deletes the key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def save_tokenizer(folder):
    """96 words, with what comes beside a published tokenizer."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
