"""Hugging Face's folders in: the same logits, or one line that says why not."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published_models import BUILD, LIMIT, edit_config, logits, our_logits, random_tokens, save, save_tokenizer

from mlx_moe.convert.importing import import_model
from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model, read_model
from mlx_moe.storage import checkpoint

TOKENS = random_tokens()


@pytest.mark.parametrize("name", BUILD)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = logits(save(name, tmp_path / "theirs"), TOKENS)
    loaded = open_model(tmp_path / "theirs")
    assert theirs.std() > 0.1
    for backend in ("torch", "mlx"):
        assert np.abs(our_logits(backend, loaded, TOKENS) - theirs).max() < LIMIT, backend


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_sharded_models_are_the_same(name, tmp_path):
    save(name, tmp_path / "one")
    save(name, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, shards = read_model(tmp_path / "one"), read_model(tmp_path / "shards")
    assert one[0] == shards[0]
    assert one[1].keys() == shards[1].keys()
    assert all(np.array_equal(array, shards[1][tensor]) for tensor, array in one[1].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_half_precision_is_read_exactly(name, dtype, tmp_path):
    model = save(name, tmp_path / "theirs", dtype)
    loaded = open_model(tmp_path / "theirs")
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(loaded.weights["embed_tokens.weight"], embeddings)
    assert np.abs(our_logits("torch", loaded, TOKENS) - logits(model, TOKENS)).max() < LIMIT


def test_names_as_the_hub_has_them(tmp_path):
    """GPT-2's release: no prefix, the causal masks, and a config without the later keys."""
    model = save("gpt2", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(tensors, file, {"format": "pt"})
    later = ("tie_word_embeddings", "n_inner", "add_cross_attention", "reorder_and_upcast_attn", "dtype")
    edit_config(tmp_path / "theirs", n_ctx=32, task_specific_params={}, **dict.fromkeys(later, ...))
    assert np.abs(our_logits("torch", open_model(tmp_path / "theirs"), TOKENS) - logits(model, TOKENS)).max() < LIMIT


def test_both_spellings_of_rope(tmp_path):
    save("llama", tmp_path / "theirs")
    thetas = []
    for changes in (
        {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
        {"rope_parameters": ..., "rope_theta": 7e4, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}, "rope_theta": 70_000},
        {"rope_parameters": ..., "rope_theta": ...},
    ):
        edit_config(tmp_path / "theirs", **changes)
        thetas.append(read_model(tmp_path / "theirs")[0].rope_theta)
    assert thetas == [7e4, 7e4, 7e4, 1e4]


def test_a_head_beside_tied_embeddings(tmp_path):
    save("llama-tied", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    assert "lm_head.weight" not in read_model(tmp_path / "theirs")[1]
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight is not the embeddings.*tie_word_embeddings"):
        read_model(tmp_path / "theirs")


def test_imported_as_a_checkpoint_with_its_tokenizer(mlxmoe, tmp_path):
    save("mixtral", tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs")
    result = mlxmoe("import", tmp_path / "theirs", tmp_path / "ours")
    assert result.code == 0, result.err
    loaded = checkpoint.load(tmp_path / "ours")
    assert loaded.config.moe.n_experts == 4
    assert loaded.state.phase == 2
    kept = {file.name for file in (tmp_path / "ours" / "tokenizer").iterdir()}
    assert kept == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    texts = [mlxmoe("generate", tmp_path / folder, "--prompt", "w1 w2", "-n", 4) for folder in ("theirs", "ours")]
    assert texts[0].code == 0, texts[0].err
    assert texts[0].out == texts[1].out


def test_parity_and_growth_take_a_folder(mlxmoe, tmp_path):
    save("llama", tmp_path / "theirs")
    assert mlxmoe("parity", tmp_path / "theirs").code == 0
    result = mlxmoe("grow", tmp_path / "theirs", tmp_path / "large", "--d-model", 48, "--n-layers", 3)
    assert result.code == 0, result.err
    assert checkpoint.load(tmp_path / "large").config.d_model == 48


REFUSED = {
    "architecture": ("llama", {"model_type": "olmoe"}, "model_type = 'olmoe'.*llama, mistral, qwen2"),
    "class": ("llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures = .*LlamaForCausalLM"),
    "scaling": (
        "llama3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}},
        r"rope_parameters\.rope_type = 'yarn'.*default, linear, llama3",
    ),
    "half a scaling": ("llama", {"rope_scaling": {"type": "linear"}}, r"no rope_scaling\.factor"),
    "more of a scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        r"rope_parameters\.beta_fast = 32.*unknown",
    ),
    "two scalings": (
        "llama3",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_scaling = .*linear.*rope_parameters is .*llama3",
    ),
    "a factor that quickens": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}},
        r"rope_scaling\.factor = 0\.5",
    ),
    "RoPE's spellings differ": ("llama", {"rope_theta": 1e6}, r"rope_parameters\.rope_theta = 50000.0.*1000000.0"),
    "interleaved": ("llama", {"rope_interleaved": True}, "rope_interleaved = True.*False"),
    "window": ("mistral", {"sliding_window": 16}, "sliding_window = 16.*max_position_embeddings"),
    "window by default": ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window = 4096"),
    "window of Qwen": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window = 16",
    ),
    "window of Qwen by depth": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": ...},
        "sliding_window = 16",
    ),
    "layers of other kinds": ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layer_types = .*full_attention"),
    "gates as they are": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False.*True"),
    "gates as they are by default": ("qwen3_moe", {"norm_topk_prob": ...}, "norm_topk_prob = False.*True"),
    "no layer with experts": ("qwen3_moe", {"mlp_only_layers": [0, 1]}, r"mlp_only_layers = \[0, 1\].*none is left"),
    "state-space layers": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "layer_types = .*mamba"),
    "no positions": ("granitemoehybrid", {"position_embedding_type": "nope"}, "position_embedding_type = 'nope'.*rope"),
    "two numbers of experts": ("qwen3_moe", {"num_experts": 8}, "num_local_experts = 4.*8"),
    "multiplier": ("granitemoe", {"residual_multiplier": 0.22}, r"residual_multiplier = 0\.22.*1"),
    "scale of attention": ("granitemoe", {"attention_multiplier": 0.5}, r"attention_multiplier = 0\.5.*0\.35"),
    "biases of Mistral": ("mistral", {"attention_bias": True}, "attention_bias = True.*False"),
    "activation": ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'.*silu"),
    "norms of q and k": ("llama", {"use_qk_norm": True}, "use_qk_norm = True.*unknown"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .*bfloat16"),
    "remote code": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .*never run"),
    "attention of GPT-2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    "no size": ("gpt2", {"n_embd": ...}, "no n_embd"),
    "size as text": ("llama", {"hidden_size": "32"}, "hidden_size = '32'.*whole number"),
    "heads": ("llama", {"num_key_value_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
    "shape": ("llama", {"intermediate_size": 64}, r"mlp\.gate_proj\.weight has shape \(48, 32\).*\(64, 32\)"),
    "shape of a head's norm": (
        "qwen3",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        r"q_norm\.weight has shape \(16,\).*\(8,\)",
    ),
    "experts of Granite": ("granitemoe", {"num_local_experts": 2}, r"has shape \(4, .*\(2, "),
    "no norms of heads": ("llama", {"model_type": "qwen3", "architectures": None}, r"q_norm\.weight is missing"),
    "missing": ("llama", {"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
    "surplus": ("llama", {"num_hidden_layers": 1}, r"no tensor model\.layers\.1.*9 such"),
    "untied without a head": ("llama-tied", {"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
    "experts": ("mixtral", {"num_local_experts": 2}, "block_sparse_moe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_named(case, tmp_path):
    name, changes, said = REFUSED[case]
    save(name, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    refused(tmp_path, said)


def test_damaged_folders(tmp_path):
    theirs = tmp_path / "theirs"
    refused(tmp_path, "no such folder")
    save("llama", theirs, max_shard_size="20KB")
    save_tokenizer(theirs)
    shard = sorted(theirs.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    refused(tmp_path, f"{shard.name}.*cut short")
    shard.write_bytes(b"\xff" * 64)
    refused(tmp_path, f"{shard.name}.*damaged")
    shard.unlink()
    refused(tmp_path, f"{shard.name}, which is missing")
    shard.write_bytes(whole)
    index = theirs / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": places["weight_map"] | {"lm_head.weight": "../secret"}}))
    refused(tmp_path, r"\.\./secret, which is not in its folder")
    index.unlink()
    refused(tmp_path, r"no model\.safetensors")
    for file in theirs.glob("*.safetensors"):
        file.unlink()
    (theirs / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pytorch_model\.bin, a pickle")
    (theirs / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (theirs / "config.json").unlink()
    refused(tmp_path, r"no config\.json")


def test_unknown_dtype(tmp_path):
    save("llama", tmp_path / "theirs", torch.float64)
    refused(tmp_path, "holds F64; save it as one of F32, F16, BF16")


def test_import_overwrites_nothing(tmp_path):
    save("llama", tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(InputError, match="exists already"):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(InputError, match="a checkpoint already"):
        import_model(str(tmp_path / "ours"), tmp_path / "again")


def refused(tmp_path, said):
    with pytest.raises(InputError) as error:
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert re.search(said, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"theirs"}  # nothing half-written


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_what_takes_the_place_of_a_file_is_refused(name, kind, llama, mlxmoe, tmp_path):
    file = shutil.copytree(llama, tmp_path / "model") / name
    file.unlink(missing_ok=True)
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "link to nothing": lambda: file.symlink_to("x")}[kind]()
    result = mlxmoe("import", tmp_path / "model", tmp_path / "out")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{file} is no regular file, or a link to what is missing" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_not_called_damaged(name, llama, as_nobody):
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o777)
        model = shutil.copytree(llama, Path(parent) / "model")
        model.chmod(0o755)
        (model / name).chmod(0)
        with as_nobody(), pytest.raises(InputError) as caught:
            import_model(str(model), Path(parent) / "out")
        assert f"cannot read {model / (name or 'config.json')}: Permission denied" in str(caught.value)
        assert "damaged" not in str(caught.value)
        assert not (Path(parent) / "out").exists()
