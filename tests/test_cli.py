"""The command as a user meets it, and above all what it says to bad input."""

import json
import subprocess
import sys
import time

import pytest

from mlx_moe.presets import preset_names

TRAIN = ("train", "--preset", "demo", "-o", "data.n_documents=300", "--backend", "torch", "--steps", 2)


@pytest.fixture(scope="module")
def small_run(mlxmoe, tmp_path_factory):
    """One dense phase of a tiny model."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    size = [
        "model.d_model=32",
        "model.n_layers=2",
        "model.n_heads=2",
        "model.context_length=32",
        "data.n_documents=300",
    ]
    options = [word for override in size for word in ("-o", override)]
    assert mlxmoe(*TRAIN, "--phases", 1, "--tokenizer", "bpe:400", *options, "--out", directory).code == 0
    return directory


def test_params_of_the_three_phases_to_the_digit(mlxmoe):
    result = mlxmoe("params", "--preset", "three-phase", "--json")
    rows = json.loads(result.out)
    assert rows["1-dense"]["total"] == 100_038_016
    moe = {"total": 371_640_256, "active_per_token": 138_878_272, "inactive": 232_761_984}
    assert rows["2-moe"].items() >= (moe | {"idle_experts": 42, "efficiency_percent": 37.4}).items()
    assert rows["3-large-moe"]["total"] == 1_436_055_192


def test_params_in_a_table(mlxmoe):
    out = mlxmoe("params").out
    for figure in ("100.04 M", "371.64 M", "138.88 M", "232.76 M", "42", "37.4", "1.44 B"):
        assert figure in out


def test_upcycle_then_grow_then_generate(small_run, mlxmoe, tmp_path):
    experts, large = tmp_path / "experts", tmp_path / "large"
    result = mlxmoe("upcycle", small_run, experts, "--experts", 4, "--backend", "torch")
    assert result.code == 0, result.err
    assert "lossless" in result.out
    result = mlxmoe("grow", experts, large, "--d-model", 40, "--n-layers", 3, "--n-heads", 3, "--backend", "mlx")
    assert result.code == 0, result.err
    texts = {
        mlxmoe("generate", path, "--prompt", "One day", "-n", 8, "--temperature", 0, "--backend", backend).out
        for path in (small_run, experts, large)
        for backend in ("mlx", "torch")
    }
    assert len(texts) == 1  # the same model all along
    assert texts.pop().startswith("One day")


def test_generate_samples_by_seed(small_run, mlxmoe):
    sample = ["generate", small_run, "-n", 20, "--temperature", 1.5, "--backend", "torch", "--seed"]
    assert mlxmoe(*sample, 1).out == mlxmoe(*sample, 1).out
    assert mlxmoe(*sample, 1).out != mlxmoe(*sample, 2).out


def test_parity_of_a_run(small_run, mlxmoe):
    result = mlxmoe("parity", small_run, "--json")
    assert result.code == 0
    assert json.loads(result.out)["passed"]


def test_parity_of_all_architectures(mlxmoe):
    result = mlxmoe("parity", "--json")
    assert result.code == 0
    comparisons = json.loads(result.out)["comparisons"]
    assert len(comparisons) == 3 * 8
    assert max(row["impact"]["max_logit_difference"] for row in comparisons) < 1e-4


def test_parity_says_that_something_differs(mlxmoe, monkeypatch):
    import torch_ref.layers

    monkeypatch.setitem(torch_ref.layers.ACTIVATIONS, "silu", torch_ref.layers.ACTIVATIONS["gelu"])
    result = mlxmoe("parity", "--preset", "llama")
    assert result.code == 1
    assert "DIFFERS" in result.out


def test_parity_that_cannot_run(mlxmoe, monkeypatch):
    monkeypatch.setattr("mlx_moe.training.backend.is_installed", lambda name: name == "torch")
    result = mlxmoe("parity", "--preset", "llama")
    assert result.code == 2
    assert "mlx is not installed" in result.err


def test_doctor_names_device_and_versions(mlxmoe):
    result = mlxmoe("doctor")
    assert result.code == 0
    for word in ("torch", "mlx", "works, on", "blas", "auto"):
        assert word in result.out


BAD_INPUT = {
    "unknown key": (["-o", "model.d_modl=64"], ["model.d_modl", "did you mean 'd_model'"]),
    "unknown preset": (["--preset", "tree-phase"], ["tree-phase", "three-phase"]),
    "out of range": (["-o", "training.batch_size=0"], ["training.batch_size = 0", "greater than or equal to 1"]),
    "heads do not divide": (["-o", "model.n_heads=7"], ["128", "7", "n_heads 8"]),
    "vocabulary too small": (
        ["--tokenizer", "bpe:400", "-o", "model.vocab_size=300"],
        ["300", "400", "model.vocab_size"],
    ),
    "no such data": (["--data", "storys"], ["storys", "stories"]),
    "unknown backend": (["--backend", "jax"], ["jax", "auto, mlx, torch"]),
    "unknown device": (["--device", "tpu"], ["tpu", "cpu"]),
    "no GPU": (["--backend", "mlx", "--device", "gpu"], ["gpu", "--device cpu"]),
    "malformed override": (["-o", "model.d_model"], ["model.d_model", "key.path=value"]),
    "missing config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "no steps": (["--steps", "0"], ["phases.dense.steps = 0", "greater than or equal to 1"]),
    "four phases": (["--phases", "4"], ["--phases 4", "no phase 4", "1 dense, 2 moe (upcycle), 3 large_moe (grow)"]),
    "growth that is not exact": (["-o", "model.norm_position=post"], ["post-norm", "n_layers 4"]),
    "shrinking": (["-o", "phases.large_moe.d_model=64"], ["d_model", "128", "64"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_explained(name, mlxmoe, tmp_path):
    arguments, said = BAD_INPUT[name]
    result = mlxmoe(*TRAIN, *arguments, "--out", tmp_path / "run")
    assert result.code == 2
    assert "Traceback" not in result.err
    for text in said:
        assert text in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("short.txt", b"Too short.", "context_length 128"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": \n', "line 2"),
        ("field.jsonl", b'{"story": "one"}\n', "story"),
        ("binary.txt", b"\xff\xfe\x00\x9f", "UTF-8"),
        ("data.xyz", b"text", ".jsonl"),
    ],
)
def test_bad_data_is_explained(name, content, said, mlxmoe, tmp_path):
    (tmp_path / name).write_bytes(content)
    result = mlxmoe(*TRAIN, "--data", tmp_path / name, "--out", tmp_path / "run")
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_explained(small_run, mlxmoe, tmp_path):
    assert mlxmoe("upcycle", small_run, tmp_path / "moe", "--backend", "torch").code == 0
    weights = tmp_path / "moe" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["generate", tmp_path / "moe"], ["grow", tmp_path / "moe", tmp_path / "out", "--n-layers", 3]):
        result = mlxmoe(*command)
        assert result.code == 2
        assert "damaged" in result.err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(small_run, mlxmoe):
    result = mlxmoe(*TRAIN, "--out", small_run)
    assert result.code == 2
    assert f"--resume {small_run}" in result.err


@pytest.mark.parametrize("content", ['{"mine": "years of work"}', None])
def test_a_run_json_of_somebody_else_is_no_run(content, mlxmoe, tmp_path):
    (tmp_path / "thesis.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    if content is None:
        (tmp_path / "mine" / "run.json").symlink_to(tmp_path / "thesis.json")
    else:
        (tmp_path / "mine" / "run.json").write_text(content)
    result = mlxmoe("train", "--data", "stories", "--tokenizer", "char", "--out", tmp_path / "mine")
    assert result.code == 2
    assert "mine is not empty; name another folder" in result.err
    assert (tmp_path / "thesis.json").read_text() == "{}"


def test_an_interrupted_command_says_so(mlxmoe, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_moe.training.run_plan.show_parameters", interrupted)
    result = mlxmoe("params")
    assert (result.code, result.err.strip()) == (130, "interrupted")


def test_nothing_to_resume(mlxmoe, tmp_path):
    assert "config.yaml" in mlxmoe("train", "--resume", tmp_path).err


def test_resume_takes_no_other_config(small_run, mlxmoe):
    result = mlxmoe("train", "--resume", small_run, "--steps", 5)
    assert result.code == 2
    assert "--resume" in result.err


def test_a_transfer_does_not_overwrite(small_run, mlxmoe):
    result = mlxmoe("upcycle", small_run, small_run)
    assert result.code == 2
    assert "exists already" in result.err


def test_help_and_import_are_quick():
    # Generous, so that a busy machine passes; what it guards against (a framework on the way) takes seconds.
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cli", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 5
    code = "import sys, cli, mlx_moe; sys.exit(any(m in sys.modules for m in ('torch', 'mlx.core', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("preset", preset_names("architectures"))
def test_every_architecture_has_three_phases(preset, mlxmoe):
    result = mlxmoe("params", "--preset", preset, "--json")
    assert result.code == 0, result.err
    totals = [row["total"] for row in json.loads(result.out).values()]
    assert totals == sorted(totals)
