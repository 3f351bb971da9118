import json

import pytest
import yaml
from pydantic import ValidationError

from mlx_moe.config import ModelConfig, RunConfig, UpcyclePhaseConfig, save
from mlx_moe.errors import InputError
from mlx_moe.phases import phase_model
from mlx_moe.presets import load_architecture, load_run, preset_names
from mlx_moe.storage.reading import read_mapping
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.validation import validate

# position encoding, normalization, activation, FFN type, norm position
STATED = {
    "simple": ("rope", "layernorm", "gelu", "standard", "pre"),
    "llama": ("rope", "rmsnorm", "silu", "swiglu", "pre"),
    "team": ("rope", "rmsnorm", "silu", "swiglu", "pre"),
    "smollm": ("rope", "rmsnorm", "silu", "swiglu", "pre"),
    "gpt2": ("learned_absolute", "layernorm", "gelu_tanh", "standard", "pre"),
    "gpt2-post": ("learned_absolute", "layernorm", "gelu_tanh", "standard", "post"),
    "hybrid": ("rope", "layernorm", "gelu", "standard", "pre"),
    "nano": ("learned_absolute", "layernorm_nobias", "gelu", "standard", "pre"),
}


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(*overrides, preset="three-phase", file=None):
    with pytest.raises(InputError) as caught:
        load_run(preset, file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", [*preset_names("runs"), *preset_names("architectures")])
def test_every_preset_loads_as_a_run(name):
    run = load_run(name)
    expected = "gpt2" if name == "shakespeare-char-cpu" else "simple"
    expected = name if name in preset_names("architectures") else expected
    assert run.model.architecture == expected


@pytest.mark.parametrize("name", preset_names("architectures"))
def test_architectures_combine_what_they_state(name):
    model = load_architecture(name)
    options = (
        model.position_encoding,
        model.normalization,
        model.activation,
        model.ffn_type,
        model.norm_position,
    )
    assert options == STATED[name]


def test_simple_is_the_default():
    assert load_architecture("simple") == ModelConfig() == RunConfig().model


def test_an_architecture_stands_in_the_three_phase_run():
    run = load_run("llama")
    assert run.model == load_architecture("llama")
    assert run.phases == load_run("three-phase").phases


@pytest.mark.parametrize(("preset", "steps", "log_every"), [("three-phase", 1000, 50), ("test-100", 100, 10)])
def test_run_defaults(preset, steps, log_every):
    run = load_run(preset)
    phases = (run.phases["dense"], run.phases["moe"], run.phases["large_moe"])
    assert [phase.steps for phase in phases] == [steps] * 3
    assert [phase.learning_rate for phase in phases] == [3e-4, 1e-4, 8e-5]
    assert (run.phases["moe"].n_experts, run.phases["moe"].top_k) == (8, 2)
    large = phase_model(run, 3)
    assert (large.d_model, large.n_layers, large.n_heads, large.d_ff) == (1352, 11, 13, 5408)
    assert (run.training.batch_size, run.training.log_every) == (8, log_every)
    assert (run.data.source, run.data.n_documents, run.data.tokenizer) == ("tinystories", 50_000, "gpt2")
    assert run.model == load_architecture("simple")


def test_three_phase_is_what_a_bare_run_is():
    assert load_run() == RunConfig()


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_overrides_win_over_files_and_files_over_presets(ending, written):
    values = {"training": {"batch_size": 3}, "phases": {"dense": {"steps": 7}}}
    file = written(f"run.{ending}", json.dumps(values) if ending == "json" else yaml.safe_dump(values))
    run = load_run("test-100", file, ["phases.dense.steps=9"])
    assert run.phases["dense"].steps == 9  # override
    assert run.training.batch_size == 3  # file
    assert run.training.log_every == 10  # preset
    assert run.phases["dense"].learning_rate == 3e-4  # beside what was overridden


def test_the_last_override_wins():
    assert load_run(overrides=["seed=1", "seed=2"]).seed == 2


def test_model_keys_stand_over_the_architecture(written):
    file = written("run.yaml", "model: {architecture: llama, n_layers: 3}")
    model = load_run("demo", file, ["model.d_model=96"]).model
    assert (model.architecture, model.normalization) == ("llama", "rmsnorm")
    assert (model.n_layers, model.d_model, model.context_length) == (3, 96, 128)


def test_numbers_that_yaml_takes_for_strings(written):
    file = written("run.yaml", "phases: {dense: {learning_rate: 1e-5}}\n")
    assert read_mapping(file)["phases"]["dense"]["learning_rate"] == "1e-5"
    run = load_run("three-phase", file, ["model.norm_eps=1e-6"])
    assert run.phases["dense"].learning_rate == 1e-5
    assert run.model.norm_eps == 1e-6


def test_an_override_may_hold_a_section_or_nothing():
    assert load_run(overrides=["model.moe={n_experts: 4, top_k: 1}"]).model.moe.n_experts == 4
    assert load_run(overrides=["data.n_documents=null"]).data.n_documents is None
    assert load_run(overrides=["name=a=b"]).name == "a=b"


def test_an_empty_file_changes_nothing(written):
    assert load_run("demo", written("run.yaml", "# later\n")) == load_run("demo")


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize("preset", [*preset_names("runs"), *preset_names("architectures")])
def test_round_trip(preset, ending, tmp_path):
    run = load_run(preset, None, ["model.moe={n_experts: 4}", "phases.dense.learning_rate=1.23456789e-7", "name=ü"])
    save(run, tmp_path / f"run.{ending}")
    assert validate(RunConfig, read_mapping(tmp_path / f"run.{ending}")) == run


def test_configs_are_frozen():
    run = load_run("demo")
    for section, key in [(run, "seed"), (run.model, "d_model"), (run.phases["moe"], "n_experts")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_what_follows_from_the_width():
    model = validate(ModelConfig, {"d_model": 64, "n_heads": 4})
    assert (model.n_kv_heads, model.head_dim, model.d_ff) == (4, 16, 256)
    assert load_architecture("llama").d_ff == 2048  # 8/3 of 768


def test_an_explicit_vocabulary_is_not_fitted_to_the_tokenizer(written):
    assert load_run("demo").data.fit_vocabulary
    assert load_run("smollm").data.fit_vocabulary  # its own size is a default like any other
    assert not load_run("demo", None, ["model.vocab_size=4096"]).data.fit_vocabulary
    assert not load_run("demo", written("run.yaml", "model: {vocab_size: 4096}")).data.fit_vocabulary


@pytest.mark.parametrize(
    ("name", "fields", "shown"),
    [
        ("llama", {}, "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"),
        ("gpt2-post", {}, "12L-12H-768D-Learned-LN-GELUtanh-PostNorm"),
        ("smollm", {}, "30L-9H3KV-576D-RoPE-RMS-SwiGLU-PreNorm"),
        ("simple", {"moe": {"n_experts": 8, "top_k": 2}}, "7L-8H-832D-RoPE-LN-GELU-PreNorm-8E2"),
        ("nano", {"ffn_type": "swiglu"}, "4L-4H-128D-Learned-LNnb-GELU-GLU-PreNorm"),
    ],
)
def test_display_name(name, fields, shown):
    assert load_architecture(name, **fields).display_name == shown


# What is refused, and what its one line says: the key, the value, the limit or the nearest key.
REFUSED = {
    "modle.d_model=64": ["'modle'", "did you mean 'model'"],
    "model.d_modl=64": ["'model.d_modl'", "did you mean 'd_model'"],
    "phases.moe.topk=1": ["'phases.moe.topk'", "did you mean 'top_k'"],
    "model.moe.expert=1": ["'model.moe.expert'", "did you mean 'n_experts'"],
    "data.zzz=1": ["'data.zzz'", "known here: source"],
    "model.1=2": ["'model.1'"],
    "model={1: 2}": ["model.1", "keys should be strings"],
    "training.batch_size=many": ["training.batch_size = 'many'", "valid integer"],
    "training.batch_size=1.5": ["training.batch_size = 1.5", "fractional"],
    "model.d_model.x=3": ["model.d_model = {'x': 3}", "valid integer"],
    "model.bias=perhaps": ["model.bias = 'perhaps'", "boolean"],
    "model=7": ["model = 7", "ModelConfig"],
    "data=null": ["data = None", "DataConfig"],
    "training.batch_size=0": ["training.batch_size = 0", "greater than or equal to 1"],
    "model.dropout=1": ["model.dropout = 1", "less than 1"],
    "seed=-1": ["seed = -1", "greater than or equal to 0"],
    "seed=9223372036854775808": ["seed = 9223372036854775808", "less than 9223372036854775808"],
    "phases.dense.learning_rate=.nan": ["phases.dense.learning_rate = nan", "finite"],
    "optimizer.betas=[0.9, 1]": ["optimizer.betas.1 = 1", "less than 1"],
    "optimizer.betas=[0.9]": ["optimizer.betas.1", "required"],
    "model.activation=gleu": ["model.activation = 'gleu'", "gelu, gelu_tanh, silu, relu, leaky_relu"],
    "model.norm_position=mid": ["model.norm_position = 'mid'", "'pre' or 'post'"],
    "model.d_model=100": ["d_model 100", "n_heads 8", "take n_heads 10"],
    "model.d_model=100.0": ["d_model 100", "n_heads 8", "take n_heads 10"],
    "model.n_kv_heads=3": ["n_heads 8", "n_kv_heads 3"],
    "model.head_dim=3": ["head_dim 3", "even"],
    "model.moe={n_experts: 4, top_k: 5}": ["model.moe", "top_k 5", "n_experts 4", "lower top_k"],
    "phases.moe.top_k=9": ["phases.moe", "top_k 9", "n_experts 8"],
    "model.architecture=lama": ["'lama'", "did you mean 'llama'", "smollm"],
    "model.n_layers": ["'model.n_layers'", "key.path=value"],
    "=3": ["'=3'", "key.path=value"],
    "model.d_model=[": ["'model.d_model=['", "'['", "YAML"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_bad_override_is_explained_in_one_line(override):
    message = refusal(override)
    assert "\n" not in message
    for text in REFUSED[override]:
        assert text in message


def test_an_unknown_preset_names_the_nearest():
    message = refusal(preset="tree-phase")
    assert "'tree-phase'" in message
    assert "did you mean 'three-phase'" in message
    for name in [*preset_names("runs"), *preset_names("architectures")]:
        assert name in message


def test_several_faults_take_a_line_each(written):
    file = written("run.yaml", "seed: -1\ntraining: {batch_size: x}\nmodel: {dropout: 2, d_modl: 3}\n")
    lines = refusal(file=file).splitlines()
    assert len(lines) == 4
    for key in ("seed", "training.batch_size", "model.dropout", "model.d_modl"):
        assert sum(key in line for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.yaml", "- 1\n", "holds a list"),
        ("list.json", "[1]", "holds a list"),
        ("word.yaml", "word", "holds a str"),
        ("open.yaml", "a: [1\nb: 2\n", "not valid YAML"),
        ("quotes.json", "{'a': 1}", "not valid JSON"),
        ("object.yaml", "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("deep.yaml", "[" * 1_500, "not valid YAML"),
        ("deep.json", "[" * 200_000, "not valid JSON"),
    ],
)
def test_a_bad_file_is_explained_in_one_line(name, text, said, written):
    message = refusal(file=written(name, text))
    assert name in message
    assert said in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        assert str(tmp_path / name) in refusal(file=tmp_path / name)


def test_the_router_of_phase_2_is_named_apart_from_its_experts():
    phase = UpcyclePhaseConfig(n_experts=4, top_k=1)
    moe = experts_of(ModelConfig(), phase)
    assert (moe.n_experts, moe.top_k) == (4, 1)
    assert not hasattr(moe, "router_std")


def test_all_documents_of_a_path_are_taken(written):
    assert load_run("demo").data.n_documents == 10_000
    assert load_run("demo", overrides=["data.source=tinystories"]).data.n_documents == 10_000
    assert load_run("demo", overrides=["data.source=mine.txt"]).data.n_documents is None
    assert load_run("demo", overrides=["data.n_documents=7", "data.source=mine.txt"]).data.n_documents == 7
    file = written("c.yaml", "data: {source: mine.txt}\n")
    assert load_run("demo", file).data.n_documents is None
