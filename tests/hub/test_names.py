"""Models by name: from huggingface_hub's cache, without a network; else one line that says what failed."""

import json

import huggingface_hub
import pytest
from support.published_models import save, save_tokenizer

from mlx_moe.errors import InputError
from mlx_moe.hub.resolve import find_model, model_name
from mlx_moe.storage import checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and no hub."""

    def out_of_reach(self, name, timeout):
        assert timeout <= 10
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", out_of_reach)
    for module in ("huggingface_hub.constants", "huggingface_hub._snapshot_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def snapshot_of(cache, name):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_imported_from_the_cache_by_name(cache, mlxmoe, tmp_path):
    snapshot = snapshot_of(cache, "someone/tiny-qwen3")
    save("qwen3", snapshot)
    save_tokenizer(snapshot)
    assert find_model("someone/tiny-qwen3") == snapshot
    result = mlxmoe("import", "someone/tiny-qwen3", tmp_path / "ours")
    assert result.code == 0, result.err
    assert (tmp_path / "ours" / "tokenizer" / "chat_template.jinja").is_file()
    assert checkpoint.load(tmp_path / "ours").state.lineage == ("someone/tiny-qwen3",)
    options = ("--experts", 4, "--top-k", 2, "--backend", "torch")
    assert mlxmoe("upcycle", tmp_path / "ours", tmp_path / "moe", *options).code == 0
    assert mlxmoe("export", tmp_path / "moe", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/tiny-qwen3\n" in card
    assert "| lineage | someone/tiny-qwen3, upcycled to 2L-4H2KV-32D-RoPE-RMS-SwiGLU-PreNorm-QKNorm-4E2 |" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_moe"


def test_half_a_model_in_the_cache_is_fetched_anew(cache):
    snapshot = snapshot_of(cache, "someone/half")
    save("qwen3", snapshot, max_shard_size="20KB")
    assert find_model("someone/half") == snapshot
    sorted(snapshot.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"cannot get a model of that name .*service not known"):
        find_model("someone/half")


@pytest.mark.parametrize("name", ["gpt2", "someone/unheard-of"])
def test_without_a_network_one_line_says_so(cache, name, mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mlxmoe("import", name, "ours")
    assert result.code == 2
    assert f"no folder {name}, and cannot get a model of that name" in result.err.replace("\n", " ")
    assert not (tmp_path / "ours").exists()


def test_folders_are_found_as_they_are(cache, tmp_path):
    for name in (str(tmp_path), "/no/such/folder", "../there"):
        assert str(find_model(name)) == name
    assert model_name(tmp_path / "SmolLM2-135M") == "SmolLM2-135M"


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "~nobody-of-that-name/x", "x\0y", "\x1b[31m"])
def test_a_name_that_no_folder_can_have(name, mlxmoe, tmp_path):
    """What cannot be read is named, not the place that would be written."""
    result = mlxmoe("import", name, tmp_path / "out")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "cannot write" not in result.err
    assert result.err.strip().isprintable()
    assert not (tmp_path / "out").exists()
