import errno
import json
import resource
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlx_moe.config import OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import initialize, normal, table
from mlx_moe.training import checkpoint
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.checkpoint import TrainerState, complete_in, folder, keep_last, load, resolve, save
from mlx_moe.transfer.growth import plan_growth
from parity.compare import larger_model, rough_weights, small_model

CONFIG = small_model("llama", d_model=16, d_ff=32, vocab_size=64, moe={"n_experts": 4})
WEIGHTS = rough_weights(CONFIG, seed=0)
MOMENTS = {
    f"{moment}.{name}": normal(f"{moment} {name}", 1, array.shape) for moment in "mv" for name, array in WEIGHTS.items()
}
OPTIMIZER = MOMENTS | {"step": np.array(7, np.float32)}
STATE = TrainerState(phase=2, step=7, backend="torch", validation_loss=1.25)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "step-7"
    save(path, CONFIG, STATE, WEIGHTS, OPTIMIZER)
    return path


def restate(path):
    """Make the manifest agree with what the files hold now."""
    files = [file for file in path.iterdir() if file.is_file() and file.name != checkpoint.MANIFEST]
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": checkpoint._sha256(file)} for file in files}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def refusal(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_arrays(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        assert array.shape == other[name].shape
        assert array.tobytes() == other[name].tobytes()


def test_everything_comes_back_bit_for_bit(saved):
    loaded = load(saved)
    assert (loaded.path, loaded.config, loaded.state) == (saved, CONFIG, STATE)
    assert_same_arrays(loaded.weights, WEIGHTS)
    assert_same_arrays(loaded.optimizer_state, OPTIMIZER)


def test_special_values_come_back_too(tmp_path):
    odd = dict(OPTIMIZER)
    odd["m.norm.weight"] = np.array([0.0, -0.0, 1e-45, 3e38] * 4, np.float32)
    save(tmp_path / "step-1", CONFIG, STATE, WEIGHTS, odd)
    assert_same_arrays(load(tmp_path / "step-1").optimizer_state, odd)


def test_arrays_that_are_views_are_saved_as_they_look(tmp_path):
    name = "layers.0.self_attn.q_proj.weight"
    save(tmp_path / "step-1", CONFIG, STATE, WEIGHTS | {name: WEIGHTS[name].T}, None)
    np.testing.assert_array_equal(load(tmp_path / "step-1").weights[name], WEIGHTS[name].T)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_grown_experts_are_saved_as_they_are(tmp_path, backend):
    # MLX computes these in an order of axes of its own.
    small = choose_backend(backend).trainer(CONFIG, OptimizerConfig(), WEIGHTS, "cpu")
    large = small.transferred(plan_growth(CONFIG, larger_model(CONFIG)))
    save(tmp_path / "step-0", large.config, STATE, large.weights(), None)
    loaded = load(tmp_path / "step-0").weights
    for name, array in large.weights().items():
        np.testing.assert_array_equal(loaded[name], array)


def test_the_birth_of_a_phase_has_no_optimizer_state(tmp_path):
    save(tmp_path / "step-0", CONFIG, STATE, WEIGHTS, None)
    assert load(tmp_path / "step-0").optimizer_state is None
    assert not (tmp_path / "step-0" / checkpoint.OPTIMIZER).exists()


def test_plain_safetensors_reads_the_names_of_the_table(saved):
    with safe_open(saved / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "np"}
    assert shapes == {parameter.name: parameter.shape for parameter in table(CONFIG)}


def test_the_folder_holds_what_it_promises(saved):
    files = {"config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"}
    assert {file.name for file in saved.iterdir()} == files
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest.keys() == files - {"manifest.json"}


def test_a_tokenizer_is_found_beside_the_checkpoint_and_in_its_run(tmp_path):
    run = tmp_path / "run"
    save(folder(run, 2, 0), CONFIG, STATE, WEIGHTS, None)
    assert load(run).tokenizer_folder is None
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert load(run).tokenizer_folder == (run / "tokenizer").resolve()
    save(tmp_path / "alone", CONFIG, STATE, WEIGHTS, None, run / "tokenizer")
    assert load(tmp_path / "alone").tokenizer_folder == tmp_path / "alone" / "tokenizer"


# Whole or not at all


@pytest.mark.parametrize("where", ["save_file", "configs.save", "_sha256", "_flush"])
@pytest.mark.parametrize("succeed_first", [0, 1])
def test_a_failure_in_the_middle_leaves_what_was_there(saved, monkeypatch, where, succeed_first):
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) > succeed_first or where == "configs.save":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    owner = checkpoint.configs if "." in where else checkpoint
    name = where.rpartition(".")[2]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    message = refusal(save, saved, CONFIG, STATE, initialize(CONFIG, 5), OPTIMIZER)
    monkeypatch.undo()
    assert "No space left on device" in message
    assert str(saved) in message
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    assert_same_arrays(load(saved).weights, WEIGHTS)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    # A limit on the size of files makes the system itself refuse, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        message = refusal(save, tmp_path / "step-1", CONFIG, STATE, WEIGHTS, OPTIMIZER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write checkpoint" in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert str(tmp_path / "run") in refusal(save, tmp_path / "run" / "step-1", CONFIG, STATE, WEIGHTS, None)


def test_what_a_kill_leaves_is_ignored_and_overwritten(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(path):
        raise Killed

    path = folder(tmp_path, 1, 5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", kill)
        with pytest.raises(Killed):
            save(path, CONFIG, STATE, WEIGHTS, OPTIMIZER)
    left = path.with_name(".step-5.partial")
    assert (left / checkpoint.MANIFEST).is_file()  # the latest moment there is
    (left / "stray").write_text("from before")
    assert list(complete_in(tmp_path)) == []
    assert "no checkpoint" in refusal(load, tmp_path)
    save(path, CONFIG, STATE, WEIGHTS, OPTIMIZER)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-5"]
    assert not (path / "stray").exists()
    assert_same_arrays(load(tmp_path).weights, WEIGHTS)


def test_saving_again_replaces_all_of_it(saved):
    weights = initialize(CONFIG, 5)
    save(saved, CONFIG, STATE, weights, None)
    assert_same_arrays(load(saved).weights, weights)
    assert load(saved).optimizer_state is None


# Damage that the manifest shows

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(saved, name):
    file = saved / name
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(load, saved)
    assert str(saved) in message
    assert f"damaged: {name} has" in message


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(saved, name):
    file = saved / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"damaged: {name} was altered" in refusal(load, saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    assert f"incomplete: {name} is missing" in refusal(load, saved)


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", "null", "7", '{"config.json": 7}', "[" * 200_000, '"\udc80"'],
    ids=["empty", "words", "list", "null", "number", "no hash", "deep", "not UTF-8"],
)
def test_a_garbled_manifest(saved, content):
    (saved / "manifest.json").write_text(content, errors="surrogateescape")
    message = refusal(load, saved)
    assert str(saved) in message
    assert "manifest.json" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trainer.json"])
def test_a_manifest_that_leaves_a_file_out(saved, name):
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest[name]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert f"manifest.json does not list {name}" in refusal(load, saved)


# Damage that agrees with its manifest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "not valid json"),
        ("[]", "holds a list"),
        ("{}", "step"),
        ('{"phase": 1, "step": 2}', "backend"),
        ('{"phase": 9, "step": 2, "backend": "mlx"}', "phase = 9"),
        ('{"phase": 1, "step": "two", "backend": "mlx"}', "step = 'two'"),
        ('{"phase": 1, "step": -1, "backend": "mlx"}', "step = -1"),
    ],
)
def test_a_garbled_trainer_state(saved, content, said):
    (saved / "trainer.json").write_text(content)
    restate(saved)
    message = refusal(load, saved)
    assert str(saved / "trainer.json") in message
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "not valid json"),
        ('"word"', "holds a str"),
        ('{"d_model": "wide", "n_layers": 0}', "d_model = 'wide'"),
        ('{"flux": 1}', "unknown key 'flux'"),
    ],
)
def test_a_garbled_config(saved, content, said):
    (saved / "config.json").write_text(content)
    restate(saved)
    message = refusal(load, saved)
    assert str(saved / "config.json") in message
    assert said in message


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")
    restate(path)


def test_a_missing_tensor(saved):
    rewrite(saved, lambda weights: weights.pop("layers.1.mlp.router.weight"))
    assert "layers.1.mlp.router.weight is missing" in refusal(load, saved)


def test_a_tensor_of_the_wrong_shape(saved):
    rewrite(saved, lambda weights: weights.update({"norm.weight": np.ones(15, np.float32)}))
    message = refusal(load, saved)
    for text in ("norm.weight", "(15,)", "(16,)"):
        assert text in message


def test_a_tensor_too_many(saved):
    rewrite(saved, lambda weights: weights.update({"layers.2.mlp.router.weight": np.ones(1, np.float32)}))
    assert "no tensor layers.2.mlp.router.weight" in refusal(load, saved)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_a_tensor_of_another_dtype(saved, dtype):
    rewrite(saved, lambda weights: weights.update({"norm.weight": np.ones(16, dtype)}))
    message = refusal(load, saved)
    assert f"norm.weight holds {np.dtype(dtype)}" in message
    assert "float32" in message


def test_a_dtype_that_numpy_does_not_know(saved):
    file = saved / "model.safetensors"
    header = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    restate(saved)
    message = refusal(load, saved)
    assert str(file) in message
    assert "bfloat16" in message


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16], ids=["empty", "noise", "bad header"]
)
def test_weights_that_are_no_safetensors(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    restate(saved)
    assert str(saved / "model.safetensors") in refusal(load, saved)


# Which one is meant


@pytest.fixture
def run(tmp_path, saved):
    """A run with checkpoints of two phases, saved in no particular order."""
    for phase, step in [(2, 10), (1, 500), (2, 9), (2, 0), (1, 1000)]:
        shutil.copytree(saved, folder(tmp_path / "run", phase, step))
    return tmp_path / "run"


def test_steps_come_in_numeric_order_and_phases_in_theirs(run):
    found = [(path.parts[-3], path.name) for path in complete_in(run)]
    dense, moe = "1-dense", "2-moe"
    assert found == [(dense, "step-500"), (dense, "step-1000"), (moe, "step-0"), (moe, "step-9"), (moe, "step-10")]


def test_a_path_means_itself_or_the_latest_below_it(run):
    assert resolve(folder(run, 2, 9)) == folder(run, 2, 9)
    assert resolve(run / "phases" / "1-dense") == folder(run, 1, 1000)
    assert resolve(run) == load(run).path == folder(run, 2, 10)


def test_a_folder_without_a_manifest_is_no_checkpoint(run):
    (folder(run, 2, 10) / checkpoint.MANIFEST).unlink()
    shutil.copytree(folder(run, 2, 9), folder(run, 2, 9).with_name("step-latest"))
    assert resolve(run) == folder(run, 2, 9)


def test_a_path_without_a_checkpoint(tmp_path):
    assert "there is no such folder" in refusal(resolve, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        message = refusal(resolve, path)
        assert str(path) in message
        assert "manifest.json is missing" in message


@pytest.mark.parametrize(("keep", "kept"), [(1, [0, 100]), (2, [0, 10, 100]), (9, [0, 9, 10, 100])])
def test_the_last_few_stay_and_the_birth(tmp_path, saved, keep, kept):
    for step in (0, 9, 10, 100):
        shutil.copytree(saved, folder(tmp_path / "run", 2, step))
    phase = folder(tmp_path / "run", 2, 0).parent
    keep_last(phase, keep)
    assert [path.name for path in complete_in(phase)] == [f"step-{step}" for step in kept]
