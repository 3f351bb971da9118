"""Ours out: transformers and mlx-lm open the files as they are, and give our logits."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from support.published_models import LIMIT, logits, our_logits, random_tokens, save, save_tokenizer
from support.small_models import rough_weights, small_model
from transformers import AutoTokenizer

import parity.libraries.mlx_lm
import parity.libraries.transformers
from mlx_moe.config import MoEConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.export import export
from mlx_moe.hub.formats import FORMATS, choose_format, to_json
from mlx_moe.hub.models import open_model
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from parity.export_check import export_checked

LIBRARIES = (parity.libraries.transformers, parity.libraries.mlx_lm)
EXPERTS = MoEConfig(n_experts=4, top_k=2)
MODELS = {
    "llama": ("llama", small_model("llama", rope_theta=5e5, n_kv_heads=2)),
    "llama, tied": ("llama", small_model("smollm")),
    "llama, biased": ("llama", small_model("llama", bias=True, head_dim=16)),
    "mixtral": ("mixtral", small_model("llama", moe=EXPERTS, rope_theta=5e5)),
    "mixtral, tied": ("mixtral", small_model("smollm", moe=EXPERTS)),
    "mixtral, granular": ("mixtral", small_model("llama", moe=MoEConfig(n_experts=8, top_k=4, d_ff=24))),
    "qwen3_moe, some layers": (
        "qwen3_moe",
        small_model("llama", n_layers=5, qk_norm=True, moe=EXPERTS.model_copy(update={"layers": (1, 3), "d_ff": 32})),
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        small_model("llama", attention_bias="qkv", moe=EXPERTS.model_copy(update={"shared_d_ff": 64})),
    ),
    "gpt2": ("gpt2", small_model("gpt2", d_ff=192, norm_eps=1e-3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_libraries_give_our_logits(name, tmp_path):
    form, config = MODELS[name]
    source = fresh(config, tmp_path)
    assert export(source, tmp_path / "out", "auto") == form
    tokens = random_tokens()
    ours = our_logits("torch", source, tokens)
    assert ours.std() > 0.1
    for library in LIBRARIES:
        assert np.abs(library.logits(tmp_path / "out", tokens) - ours).max() < LIMIT, library.NAME
    again = open_model(tmp_path / "out")
    assert all(np.array_equal(array, again.weights[tensor]) for tensor, array in source.weights.items())


def test_from_their_dense_model_to_their_mixture(tmp_path, mlxmoe):
    dense = logits(save("llama-tied", tmp_path / "dense"), random_tokens())
    save_tokenizer(tmp_path / "dense")
    options = ("--experts", 4, "--top-k", 2, "--backend", "torch")
    assert mlxmoe("upcycle", tmp_path / "dense", tmp_path / "moe", *options).code == 0
    result = mlxmoe("export", tmp_path / "moe", tmp_path / "out", "--format", "mixtral")
    assert result.code == 0, result.err
    assert "logits of transformers" in result.out
    assert "logits of mlx_lm" in result.out
    for library in LIBRARIES:
        assert np.abs(library.logits(tmp_path / "out", random_tokens()) - dense).max() < LIMIT, library.NAME
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert (
        config["eos_token_id"] == json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [4, 5]
    card = (tmp_path / "out" / "README.md").read_text()
    taken = checkpoint.load(tmp_path / "moe").path.name
    for said in ("4E2", "mixtral", "dense, upcycled to 2L", "0 steps", taken):
        assert said in card


def test_a_lossy_upcycling_is_written_and_says_by_how_much(tmp_path, mlxmoe):
    save("qwen3", tmp_path / "dense")
    options = ("--experts", 4, "--backend", "torch")
    result = mlxmoe("upcycle", tmp_path / "dense", tmp_path / "moe", *options, "--drop", 0.5)
    assert result.code == 0, result.err
    for said in ("jump", "NOT lossless", "noise and drop change the model on purpose"):
        assert said in result.out
    assert mlxmoe("export", tmp_path / "moe", tmp_path / "out", "--format", "qwen3_moe").code == 0
    result = mlxmoe("upcycle", tmp_path / "dense", tmp_path / "other", *options, "--drop", 1.5)
    assert (result.code, "drop = 1.5" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("theirs", "options", "form", "said"),
    [
        ("qwen3", ("--every", 2, "--granularity", 2), "qwen3_moe", "8 in each of 1 of 2 layers, 4 per token"),
        ("llama-tied", ("--granularity", 4), "mixtral", "16 per layer, 8 per token"),
        ("llama", ("--shared",), "granitemoehybrid", "4 per layer, 2 per token, and a shared one"),
        ("llama", ("--router", "centroids", "--text", "stories"), "mixtral", "4 per layer, 2 per token"),
    ],
    ids=["qwen3_moe", "mixtral", "granitemoehybrid", "centroids"],
)
def test_every_way_to_upcycle_goes_out(theirs, options, form, said, tmp_path, mlxmoe):
    dense = logits(save(theirs, tmp_path / "dense"), random_tokens())
    save_tokenizer(tmp_path / "dense")
    result = mlxmoe("upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", 4, *options, "--backend", "torch")
    assert (result.code, "lossless" in result.out) == (0, True), result.err
    result = mlxmoe("export", tmp_path / "moe", tmp_path / "out")
    assert (result.code, f"in the format {form}" in result.out) == (0, True), result.err
    for library in LIBRARIES:
        assert np.abs(library.logits(tmp_path / "out", random_tokens()) - dense).max() < LIMIT, library.NAME
    assert said in (tmp_path / "out" / "README.md").read_text()
    again = mlxmoe("grow", tmp_path / "out", tmp_path / "large", "--d-model", 48, "--n-layers", 4, "--backend", "torch")
    assert (again.code, "lossless" in again.out) == (0, True), again.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--router", "centroids"), "--router centroids and --text FILE go together"),
        (("--text", "stories"), "--router centroids and --text FILE go together"),
        (("--every", 3), "every 3 leaves no layer of 2 with experts"),
        (("--granularity", 5), "granularity 5 does not divide d_ff 48; take 4"),
        (("--router", "centroids", "--text", "no.txt"), "no file or folder 'no.txt'"),
    ],
    ids=str,
)
def test_a_way_to_upcycle_that_does_not_work_writes_nothing(options, said, tmp_path, mlxmoe):
    save("llama", tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    result = mlxmoe("upcycle", tmp_path / "dense", tmp_path / "moe", *options, "--backend", "torch")
    assert (result.code, said in result.err) == (2, True), result.err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_shards(tmp_path):
    source = fresh(small_model("llama", moe=EXPERTS), tmp_path)
    export(source, tmp_path / "one", "auto")
    export(source, tmp_path / "shards", "auto", shard_bytes=100_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * array.size for array in source.weights.values())
    for library in LIBRARIES:
        one, many = (library.logits(tmp_path / folder, random_tokens()) for folder in ("one", "shards"))
        assert np.array_equal(one, many), library.NAME


CANNOT = {
    "layernorm": (small_model("llama", moe=EXPERTS, normalization="layernorm"), "mixtral", "normalization layernorm"),
    "biases of experts": (small_model("llama", moe=EXPERTS, bias=True), "mixtral", "biases"),
    "gelu": (small_model("llama", activation="gelu"), "llama", "activation gelu"),
    "post-norm": (small_model("gpt2-post"), "gpt2", "norm_position post"),
    "head_dim": (small_model("llama", moe=EXPERTS, head_dim=16), "mixtral", "head_dim 16 .mlx-lm"),
    "width of GPT-2": (small_model("gpt2"), "gpt2", "d_ff 96 .mlx-lm: only 4 · d_model = 192"),
    "no positions": (small_model("llama", position_encoding="none"), "llama", "position_encoding none"),
    "the other kind": (small_model("llama"), "mixtral", "without experts; take --format llama"),
    "dense layers": (
        small_model("llama", moe=MoEConfig(layers=[1])),
        "auto",
        "closest is mixtral, .* dense layers beside",
    ),
    "a shared expert": (
        small_model("llama", moe=MoEConfig(shared_d_ff=9)),
        "mixtral",
        "take --format granitemoehybrid",
    ),
    "nearest": (small_model("hybrid", d_ff=192), "auto", "closest is gpt2, which cannot hold"),
    "unknown": (small_model("llama"), "gguf", "auto, mlx, llama, qwen2, qwen3, mixtral, .*gpt2"),
}


@pytest.mark.parametrize("requested", ["auto", "mlx"])
def test_the_help_names_every_format(requested, mlxmoe):
    assert choose_format(small_model("llama", moe=EXPERTS), requested) == "mixtral"
    said = mlxmoe("export", "--help").out
    assert all(name in said for name in (requested, *FORMATS))


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_format_cannot_hold_is_named(case):
    config, requested, said = CANNOT[case]
    with pytest.raises(InputError, match=said) as error:
        choose_format(config, requested)
    assert "\n" not in str(error.value)


def test_a_library_that_disagrees_fails_the_export(tmp_path, monkeypatch):
    save("llama", tmp_path / "theirs")
    true = parity.libraries.mlx_lm.logits
    monkeypatch.setattr(parity.libraries.mlx_lm, "logits", lambda folder, tokens: true(folder, tokens) + 1e-3)
    with pytest.raises(InputError, match=r"mlx_lm gives logits that differ by 1\.0e-03"):
        export_checked(tmp_path / "theirs", tmp_path / "out", "auto", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    export_checked(tmp_path / "theirs", tmp_path / "out", "auto", verify=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_library_that_cannot_open_it_fails_the_export(tmp_path, monkeypatch):
    save("gpt2", tmp_path / "theirs")
    monkeypatch.setattr("mlx_moe.hub.formats.to_json", without("n_ctx"))  # transformers does without it, mlx-lm cannot
    with pytest.raises(InputError, match=r"mlx_lm cannot open the export[^;]*n_ctx"):
        export_checked(tmp_path / "theirs", tmp_path / "out", "auto", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_read_back_must_be_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_moe.hub.formats.to_json", without("rope_parameters", "rope_theta"))
    with pytest.raises(InputError, match="llama does not hold"):
        export(fresh(small_model("llama", rope_theta=5e5), tmp_path), tmp_path / "out", "auto")
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        export(fresh(small_model("llama"), tmp_path), tmp_path, "auto")


HOSTILE = (
    "a/b\nlicense: mit\ntags: [x]",
    "---\n# owned\n---",
    "<script>alert(1)</script>",
    "x | y |\n| made | up |",
    "[click](javascript:alert(1)) ![i](http://evil/x.png) `code` **bold** @user https://evil.example www.evil.example",
    "\x1b[31mred\x1b[0m \u202egnp.exe",
    "a" * 100_000,
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_lineage_writes_no_markup_into_the_card(name, tmp_path):
    plain, hostile = (
        replace(fresh(small_model("llama"), tmp_path), state=TrainerState(1, 7, "torch", lineage=lineage))
        for lineage in (("safe/model", "grown"), (name, name))
    )
    cards = []
    for folder, source in (("plain", plain), ("hostile", hostile)):
        export(source, tmp_path / folder, "auto")
        cards.append((tmp_path / folder / "README.md").read_text())
    fronts = [yaml.safe_load(card.split("---")[1]) for card in cards]
    assert fronts[0].pop("base_model") == "safe/model"
    assert (
        fronts[1]
        == fronts[0]
        == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["mlx", "mlxmoe"],
        }
    )
    assert len(cards[0].splitlines()) == len(cards[1].splitlines()) + 1  # base_model
    (row,) = [line for line in cards[1].splitlines() if line.startswith("| lineage |")]
    assert len(row) < 5000
    assert row.isprintable()
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not re.search(r"<|(?<!\\)[\[`*!]|://|@|www\.", row)


def test_a_folder_named_like_markup(tmp_path, mlxmoe):
    """Its name becomes the lineage."""
    folder = tmp_path / "<img src=x> | a\nlicense: mit"
    save("llama", folder)
    assert mlxmoe("export", folder, tmp_path / "out", "--no-verify").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "<img" not in card
    assert "\nlicense" not in card


def test_a_tokenizer_that_names_code_is_not_passed_on(tmp_path):
    config = small_model("llama", vocab_size=96)
    (tmp_path / "step-7" / "tokenizer").mkdir(parents=True)
    save_tokenizer(tmp_path / "step-7" / "tokenizer")
    file = tmp_path / "step-7" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(InputError, match=r"auto_map = .* never run"):
        export(fresh(config, tmp_path), tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()


def fresh(config, path):
    state = TrainerState(2 if config.moe else 1, 7, "torch")
    return Checkpoint(path / "step-7", config, state, rough_weights(config, 0))


def without(*keys):
    return lambda *arguments: {key: value for key, value in to_json(*arguments).items() if key not in keys}
