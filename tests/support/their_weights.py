"""Our weights and configs under the names of transformers' Llama, Mixtral and GPT-2."""

import numpy as np

from mlx_moe.hub.rope_keys import write_rope


def llama_config(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config)["rope_parameters"],
        "tie_word_embeddings": config.weight_tying,
    }


def llama_weights(config, weights):
    theirs = {name if name == "lm_head.weight" else f"model.{name}": array for name, array in weights.items()}
    return theirs | ({"lm_head.weight": weights["embed_tokens.weight"]} if config.weight_tying else {})


def mixtral_weights(config, weights):
    theirs = llama_weights(config, weights)
    for layer in range(config.n_layers):
        mlp = f"model.layers.{layer}.mlp."
        theirs[f"{mlp}gate.weight"] = theirs.pop(f"{mlp}router.weight")
        gate, up, down = (theirs.pop(f"{mlp}experts.{name}_proj.weight") for name in ("gate", "up", "down"))
        theirs[f"{mlp}experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        theirs[f"{mlp}experts.down_proj"] = down
    return theirs


def gpt2_weights(config, weights):
    """GPT-2's linear maps are stored as (in, out), and one of them yields queries, keys and values."""
    theirs = {
        "transformer.wte.weight": weights["embed_tokens.weight"],
        "transformer.wpe.weight": weights["embed_positions.weight"],
        "lm_head.weight": weights["embed_tokens.weight"],
    }
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = weights[f"norm.{kind}"]
        for layer in range(config.n_layers):
            ours, block = f"layers.{layer}.", f"transformer.h.{layer}."
            qkv = [weights[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            theirs[f"{block}ln_1.{kind}"] = weights[f"{ours}input_layernorm.{kind}"]
            theirs[f"{block}ln_2.{kind}"] = weights[f"{ours}post_attention_layernorm.{kind}"]
            theirs[f"{block}attn.c_attn.{kind}"] = np.concatenate(qkv).T
            theirs[f"{block}attn.c_proj.{kind}"] = weights[f"{ours}self_attn.o_proj.{kind}"].T
            theirs[f"{block}mlp.c_fc.{kind}"] = weights[f"{ours}mlp.up_proj.{kind}"].T
            theirs[f"{block}mlp.c_proj.{kind}"] = weights[f"{ours}mlp.down_proj.{kind}"].T
    return theirs
