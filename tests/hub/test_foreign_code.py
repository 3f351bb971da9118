"""No command runs code that comes with a model, whatever names it, and whatever is typed when a library asks."""

import io
import json
import pickle

import pytest
from support.published_models import edit_config

from mlx_moe.errors import InputError
from mlx_moe.hub.foreign import opened_for_library, read_settings

COMMANDS = {
    "parity --model": ("parity", "--model", "MODEL"),
    "parity": ("parity", "MODEL"),
    "import": ("import", "MODEL", "OUT"),
    "export": ("export", "MODEL", "OUT"),
    "upcycle": ("upcycle", "MODEL", "OUT", "--experts", 2),
    "grow": ("grow", "MODEL", "OUT", "--d-model", 48),
    "generate": ("generate", "MODEL", "-n", 1),
    "eval": ("eval", "MODEL", "--data", "stories"),
    "train --from": ("train", "--from", "MODEL", "--data", "stories", "--steps", 1, "--phases", 1, "--out", "OUT"),
}
CODE = {
    "auto_map": {"auto_map": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}},
    "auto_map of another repository": {"auto_map": {"AutoModelForCausalLM": "someone/else--planted.Model"}},
    "model_file": {"model_file": "planted.py"},
    "nested": {"text_config": {"sub_config": [{"auto_map": {"AutoModel": "planted.Model"}}]}},
    "kernel": {"_attn_implementation": "org/kernel"},
    "kernel with a revision": {"attn_implementation": "org/kernel@main:flash"},
    "kernel by part": {"attn_implementation": {"text_config": "org/kernel"}},
    "kernel of experts": {"experts_implementation": "org/kernel"},
    "pipeline": {"custom_pipelines": {"text-generation": {"impl": "planted.Pipeline"}}},
}


class Planted:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def model(llama, tmp_path):
    """A model beside which everything lies that could run; `mark` appears where it does."""
    folder, mark = tmp_path / "theirs", tmp_path / "mark"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    code = f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass ModelArgs: pass\n"
    for name in ("planted.py", "modeling_llama.py", "tokenization.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    (folder / "custom_generate" / "requirements.txt").write_text("nothing\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    return folder


def answered(mlxmoe, monkeypatch, command, model, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    out = tmp_path / "out"
    result = mlxmoe(*(model if part == "MODEL" else out if part == "OUT" else part for part in COMMANDS[command]))
    assert not (tmp_path / "mark").exists(), "code of the model ran"
    return result


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("changes", [CODE["auto_map"], CODE["model_file"], CODE["nested"]], ids=["map", "file", "in"])
def test_every_command_refuses_code_of_a_model(changes, command, model, mlxmoe, monkeypatch, tmp_path):
    edit_config(model, **changes)
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert result.code == 2
    assert "never run" in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_the_tokenizer_is_refused(command, model, mlxmoe, monkeypatch, tmp_path):
    config = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["planted.Slow", "planted.Fast"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "tokenizer_config.json: auto_map" in result.err


@pytest.mark.parametrize("name", CODE)
def test_whatever_names_code_is_refused(name, model):
    edit_config(model, **CODE[name])
    with pytest.raises(InputError, match="never run"):
        read_settings(model)


@pytest.mark.parametrize("command", ["parity --model", "import", "export"])
def test_code_that_lies_beside_a_model_is_never_opened(command, model, mlxmoe, monkeypatch, tmp_path):
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert result.code == (1 if command == "parity --model" else 0), result.err  # mlx-lm reads another RoPE base there


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_beside_a_model_is_refused_and_not_loaded(command, model, mlxmoe, monkeypatch, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "auto_mapping": {"x": "planted"}}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "holds an adapter" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["parity --model", "import", "upcycle", "train --from"])
def test_a_pickle_is_no_model(command, model, mlxmoe, monkeypatch, tmp_path):
    (model / "model.safetensors").unlink()
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "only pytorch_model.bin, a pickle" in result.err


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../other.safetensors", "/etc/passwd", "a" * 300, "x\0.safetensors"]
)
def test_an_index_names_safetensors_of_its_folder_only(name, model, mlxmoe, monkeypatch, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for command in ("parity --model", "import"):
        result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
        assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
        assert "not in its folder, or no .safetensors file" in result.err


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
@pytest.mark.parametrize("command", ["parity --model", "import"])
def test_quantised_models_are_refused(key, command, model, mlxmoe, monkeypatch, tmp_path):
    edit_config(model, **{key: {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    result = answered(mlxmoe, monkeypatch, command, model, tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "quantised" in result.err


def test_libraries_see_nothing_but_the_config_and_the_weights(model):
    edit_config(model, _name_or_path="someone/else", _attn_implementation="sdpa", auto_map={})
    with opened_for_library(model) as found:
        assert sorted(file.name for file in found.folder.iterdir()) == ["config.json", "model.safetensors"]
        written = json.loads((found.folder / "config.json").read_text())
    assert not {"_name_or_path", "_attn_implementation", "auto_map"} & written.keys()
    assert not found.folder.exists()
