import errno
import itertools
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.checkpoints import create
from support.short_runs import checkpoint_folder as folder
from support.small_models import larger_model, rough_weights, small_model

from mlx_moe.config import OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import initialize, normal, parameter_table
from mlx_moe.storage import atomic, checkpoint
from mlx_moe.storage.checkpoint import TrainerState, complete_in, keep_last, load, resolve, save
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.growth import plan_growth

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
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": checkpoint.sha256(file)} for file in files}
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
    assert (loaded.path, loaded.config, loaded.state) == (saved, CONFIG, replace(STATE, has_optimizer_state=True))
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
    small = choose_backend(backend).trainer(CONFIG, WEIGHTS, OptimizerConfig(), "cpu")
    large = small.apply_transfer(plan_growth(CONFIG, larger_model(CONFIG)))
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
        assert file.metadata() == {"format": "pt"}
    assert shapes == {parameter.name: parameter.shape for parameter in parameter_table(CONFIG)}


def test_the_folder_holds_what_it_promises(saved):
    files = {"config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"}
    assert {file.name for file in saved.iterdir()} == files
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest.keys() == files - {"manifest.json"}


def test_a_tokenizer_is_found_beside_the_checkpoint_and_in_its_run(tmp_path):
    run = tmp_path / "run"
    save(folder(run, 2, 0), CONFIG, replace(STATE, step=0), WEIGHTS, None)
    assert load(run).tokenizer_folder is None
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert load(run).tokenizer_folder is None  # no run without its config
    (run / "config.yaml").write_text("{}")
    assert load(run).tokenizer_folder == (run / "tokenizer").resolve()
    create(tmp_path / "alone", CONFIG, STATE, lambda name: [WEIGHTS[name]], run / "tokenizer")
    assert load(tmp_path / "alone").tokenizer_folder == tmp_path / "alone" / "tokenizer"


# Whole or not at all


@pytest.mark.parametrize("where", ["write_file", "configs.save", "sha256", "atomic.flush"])
@pytest.mark.parametrize("succeed_first", [0, 1])
def test_a_failure_in_the_middle_leaves_what_was_there(saved, monkeypatch, where, succeed_first):
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) > succeed_first or where == "configs.save":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    module, _, name = where.rpartition(".")
    owner = {"configs": checkpoint.configs, "atomic": atomic, "": checkpoint}[module]
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


class Killed(BaseException):
    """Passes every `except Exception`, so that nothing cleans up, as after kill -9."""


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
operations_left = [-1]


def kill_at_operation(event, arguments):
    if event in FILE_OPERATIONS and operations_left[0] >= 0:
        if operations_left[0] == 0:
            raise Killed
        operations_left[0] -= 1


@pytest.fixture(scope="module")
def killed_at():
    """Run a function and kill it at its n-th operation on files; whether it got that far."""
    sys.addaudithook(kill_at_operation)  # Python cannot take it off again

    def run(n, function):
        operations_left[0] = n
        try:
            function()
            return False
        except Killed:
            return True
        finally:
            operations_left[0] = -1

    return run


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(killed_at, tmp_path):
    new = initialize(CONFIG, 5)
    old_moments, new_moments = ({**OPTIMIZER, "step": np.array(n, np.float32)} for n in (7, 8))
    for n in itertools.count():
        run = tmp_path / str(n)
        for old in (0, 3, 7):
            save(folder(run, 2, old), CONFIG, replace(STATE, step=old), WEIGHTS, old_moments)
        path = folder(run, 2, 8)

        def write(path=path):
            save(path, CONFIG, replace(STATE, step=8), new, new_moments)
            keep_last(path.parent, 1)

        killed = killed_at(n, write)
        found = load(run)
        assert (found.path.name, n_steps(found)) in [("step-7", 7), ("step-8", 8)], n
        warnings = []
        loaded = checkpoint.load_latest(run, warnings.append)
        assert (loaded.path.name, n_steps(loaded)) in [("step-7", 7), ("step-8", 8)], n
        assert_same_arrays(loaded.weights, new if n_steps(loaded) == 8 else WEIGHTS)
        assert warnings == []  # a kill is not damage
        assert {entry.name for entry in path.parent.iterdir()} <= {"step-0", "step-3", "step-7", "step-8"}
        write()
        assert n_steps(load(run)) == 8
        if not killed:
            break
    assert n > 20


def n_steps(loaded):
    return int(loaded.optimizer_state["step"])


def test_saving_again_sets_aside_what_was_there(saved):
    weights = initialize(CONFIG, 5)
    save(saved, CONFIG, STATE, weights, None)
    assert_same_arrays(load(saved).weights, weights)
    assert load(saved).optimizer_state is None
    assert_same_arrays(load(saved.with_name("step-7.earlier")).weights, WEIGHTS)


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
    ("file", "content", "said"),
    [
        ("trainer.json", "not json", "not valid JSON"),
        ("trainer.json", "[]", "holds a list"),
        ("trainer.json", "{}", "step"),
        ("trainer.json", '{"phase": 1, "step": 2}', "backend"),
        ("trainer.json", '{"phase": 99, "step": 2, "backend": "mlx"}', "phase = 99"),
        ("trainer.json", '{"phase": 1, "step": "two", "backend": "mlx"}', "step = 'two'"),
        ("trainer.json", '{"phase": 1, "step": -1, "backend": "mlx"}', "step = -1"),
        ("config.json", "not json", "not valid JSON"),
        ("config.json", '"word"', "holds a str"),
        ("config.json", '{"d_model": "wide", "n_layers": 0}', "d_model = 'wide'"),
        ("config.json", '{"flux": 1}', "unknown key 'flux'"),
    ],
)
def test_a_garbled_file(saved, file, content, said):
    (saved / file).write_text(content)
    restate(saved)
    message = refusal(load, saved)
    assert str(saved / file) in message
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


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (np.float64, "F64"), (np.int32, "I32")])
def test_a_tensor_of_another_dtype(saved, dtype, name):
    rewrite(saved, lambda weights: weights.update({"norm.weight": np.ones(16, dtype)}))
    message = refusal(load, saved)
    assert f"norm.weight holds {name}" in message
    assert "float32" in message


def test_a_dtype_that_numpy_does_not_know(saved):
    file = saved / "optimizer.safetensors"
    header = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    restate(saved)
    message = refusal(lambda: load(saved).optimizer_state)
    assert str(file) in message
    assert "x holds BF16" in message


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16], ids=["empty", "noise", "bad header"]
)
def test_weights_that_are_no_safetensors(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    restate(saved)
    assert str(saved / "model.safetensors") in refusal(load, saved)


# Which one is meant


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of two phases, saved in no particular order."""
    for phase, step in [(2, 10), (1, 500), (2, 9), (2, 0), (1, 1000)]:
        save(folder(tmp_path / "run", phase, step), CONFIG, replace(STATE, phase=phase, step=step), WEIGHTS, OPTIMIZER)
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
def test_the_last_few_stay_and_the_birth(tmp_path, keep, kept):
    for step in (0, 9, 10, 100):
        save_measured(tmp_path / "run", 2, step, None)
    phase = folder(tmp_path / "run", 2, 0).parent
    keep_last(phase, keep)
    assert [path.name for path in phase.iterdir() if path.name[0] == "."] == []
    assert [path.name for path in complete_in(phase)] == [f"step-{step}" for step in kept]


def test_the_best_stays_too_and_is_found_by_its_name(tmp_path):
    run = tmp_path / "run"
    for step, loss in [(0, None), (10, 1.5), (20, 1.25), (30, 1.25), (40, None), (50, 1.75)]:
        save_measured(run, 2, step, loss)
        keep_last(folder(run, 2, step).parent, 1)
    assert [path.name for path in complete_in(run)] == ["step-0", "step-20", "step-50"]
    save_measured(run, 3, 10, 1.5)
    assert resolve(run / "best") == resolve(run / "phases" / "2-moe" / "best") == folder(run, 2, 20)
    assert resolve(run / "phases" / "3-large-moe" / "best") == folder(run, 3, 10)
    assert checkpoint.best_validation_loss(folder(run, 3, 0).parent) == 1.5
    assert resolve(run) == folder(run, 3, 10)


def test_without_a_validation_loss_there_is_no_best(tmp_path):
    run = tmp_path / "run"
    save_measured(run, 2, 0, None)
    assert checkpoint.best(run) is None
    assert checkpoint.best_validation_loss(run) == math.inf
    message = refusal(resolve, run / "best")
    for text in (str(run / "best"), "validation loss"):
        assert text in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"validation_loss": "low"}'])
def test_what_is_damaged_is_not_the_best(tmp_path, content):
    run = tmp_path / "run"
    save_measured(run, 2, 10, 1.5)
    save_measured(run, 2, 20, 1.25)
    (folder(run, 2, 20) / "trainer.json").write_text(content)
    assert checkpoint.best(run) == folder(run, 2, 10)


# What is no checkpoint of the run, whatever it looks like


def test_a_copied_phase_is_not_the_latest(run):
    shutil.copytree(run / "phases" / "2-moe", run / "phases" / "backup-of-moe")
    shutil.copytree(run / "phases" / "2-moe", run / "phases" / "9-moe")
    assert resolve(run) == folder(run, 2, 10)
    assert checkpoint.load_latest(run, pytest.fail).path == folder(run, 2, 10)


def test_a_checkpoint_under_another_name_is_not_the_latest(run):
    shutil.copytree(folder(run, 2, 9), folder(run, 2, 99))
    shutil.copytree(folder(run, 2, 9), folder(run, 3, 9))
    assert resolve(run) == folder(run, 2, 10)
    assert "is not what its place says: trainer.json names phase 2, step 9" in refusal(load, folder(run, 3, 9))
    warnings = []
    assert checkpoint.load_latest(run, warnings.append).path == folder(run, 2, 10)
    assert len(warnings) == 1  # phase 3 has nothing of its own, so it is a copy


def test_a_copied_checkpoint_does_not_hide_a_phase(run):
    save(folder(run, 3, 1), CONFIG, replace(STATE, phase=3, step=1), WEIGHTS, OPTIMIZER)
    shutil.copytree(folder(run, 2, 9), folder(run, 3, 9))
    warnings = []
    assert checkpoint.load_latest(run, warnings.append).path == folder(run, 3, 1)
    assert len(warnings) == 1


@pytest.mark.parametrize("change", ["altered", "gone", "gone from the manifest only"])
def test_an_optimizer_state_that_the_manifest_leaves_out(saved, change):
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["optimizer.safetensors"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    if change == "altered":
        (saved / "optimizer.safetensors").write_bytes((saved / "optimizer.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    if change == "gone":
        (saved / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors" in refusal(load, saved)


@pytest.mark.parametrize("name", ["../step-3/config.json", "/etc/passwd", ""])
def test_a_manifest_that_points_elsewhere(saved, name):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest[name] = manifest["config.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in refusal(load, saved)


def test_a_checkpoint_that_is_read_is_not_pruned(run):
    held = load(folder(run, 2, 9))
    keep_last(folder(run, 2, 0).parent, 1)
    assert folder(run, 2, 9).is_dir()
    assert_same_arrays(held.weights, WEIGHTS)
    del held
    keep_last(folder(run, 2, 0).parent, 1)
    assert not folder(run, 2, 9).exists()


def test_pruning_deletes_nothing_that_is_not_ours(run):
    (folder(run, 2, 9) / "notes.txt").write_text("precious")
    keep_last(folder(run, 2, 0).parent, 1)
    assert (folder(run, 2, 9) / "notes.txt").read_text() == "precious"
    assert_same_arrays(load(folder(run, 2, 9)).weights, WEIGHTS)


def test_a_checkpoint_that_goes_while_it_is_opened(run, monkeypatch):
    """By a run that trains: the one that took its place is opened."""

    def pruned(path, **options):
        monkeypatch.undo()
        shutil.rmtree(path)
        return acquire(path, **options)

    acquire = checkpoint.locks.acquire
    monkeypatch.setattr(checkpoint.locks, "acquire", pruned)
    assert load(run).path == folder(run, 2, 9)
    monkeypatch.setattr(checkpoint.locks, "acquire", pruned)
    with pytest.raises(checkpoint.Pruned):
        load(folder(run, 2, 9))


# Going on past damage


@pytest.fixture
def damaged_run(tmp_path):
    """Steps 10, 20 and 30 of phase 2; the last two damaged in different ways."""
    run = tmp_path / "run"
    for step in (10, 20, 30):
        save_measured(run, 2, step, None)
    (folder(run, 2, 20) / checkpoint.MANIFEST).unlink()
    with (folder(run, 2, 30) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    return run


def test_the_last_whole_checkpoint_is_used_with_a_warning(damaged_run):
    warnings = []
    assert checkpoint.load_latest(damaged_run, warnings.append).path == folder(damaged_run, 2, 10)
    for warning, step, reason in zip(warnings, (30, 20), ("bytes where", "manifest.json is missing"), strict=True):
        for text in (f"step-{step} ", reason, f"step-{step}.damaged", "2-moe/checkpoints/step-10 takes its place"):
            assert text in warning
    names = {path.name for path in folder(damaged_run, 2, 0).parent.iterdir()}
    assert names == {"step-10", "step-20.damaged", "step-30.damaged"}
    assert resolve(damaged_run) == folder(damaged_run, 2, 10)


def test_damage_twice_at_the_same_step(damaged_run):
    checkpoint.load_latest(damaged_run, lambda warning: None)
    save_measured(damaged_run, 2, 20, None)
    (folder(damaged_run, 2, 20) / "trainer.json").unlink()
    assert checkpoint.load_latest(damaged_run, lambda warning: None).path == folder(damaged_run, 2, 10)
    assert not (folder(damaged_run, 2, 20).with_name("step-20.damaged-2") / "trainer.json").exists()


def test_where_all_are_damaged_nothing_is_touched(damaged_run):
    (folder(damaged_run, 2, 10) / "model.safetensors").unlink()
    message = refusal(checkpoint.load_latest, damaged_run, pytest.fail)
    for text in ("no checkpoint in", "step-30", "another run"):
        assert text in message
    names = {path.name for path in folder(damaged_run, 2, 0).parent.iterdir()}
    assert names == {"step-10", "step-20", "step-30"}


def test_a_checkpoint_that_is_whole_but_not_ours_is_an_error_not_damage(damaged_run):
    # Passing over it would start a run anew that an older version of the program could resume.
    config = folder(damaged_run, 2, 10) / "config.json"
    config.write_text('{"flux": 1}')
    restate(config.parent)
    assert "unknown key 'flux'" in refusal(checkpoint.load_latest, damaged_run, lambda warning: None)
    assert config.exists()


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.load_latest(tmp_path, pytest.fail) is None


def save_measured(run, phase, step, validation_loss):
    state = TrainerState(phase, step, "torch", validation_loss)
    save(folder(run, phase, step), CONFIG, state, WEIGHTS, None)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer.json"])
def test_what_may_not_be_read_is_not_taken_for_damaged(name, as_nobody):
    with tempfile.TemporaryDirectory() as parent:
        path = folder(Path(parent), 2, 7)
        save(path, CONFIG, STATE, WEIGHTS, OPTIMIZER)
        (path / name).chmod(0)
        for place in [Path(parent), *Path(parent).rglob("*")]:
            if place.is_dir():
                place.chmod(0o777)
        with as_nobody():
            message = refusal(checkpoint.load_latest, Path(parent), print)
        assert message == f"cannot read {path / name}: Permission denied; make it readable, or move it away"
        assert path.is_dir()


def test_a_damaged_manifest_of_an_earlier_checkpoint_stops_no_saving(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "config.yaml").touch()
    for step in (1, 2, 3):
        run.save(CONFIG, TrainerState(2, step, "torch", 1.0, phase_name="moe"), WEIGHTS, None, keep=9)
    (folder(tmp_path, 2, 2) / "manifest.json").write_text("{")
    for step in (4, 5):
        run.save(CONFIG, TrainerState(2, step, "torch", 1.0, phase_name="moe"), WEIGHTS, None, keep=1)
    assert checkpoint.latest(tmp_path) == folder(tmp_path, 2, 5)
    assert folder(tmp_path, 2, 2).is_dir()  # what in it is ours is not to be known


def test_a_reader_waits_while_a_run_decides_to_delete(tmp_path):
    path = folder(tmp_path, 2, 3)
    save(path, CONFIG, STATE, WEIGHTS, None)
    held = checkpoint.locks.acquire(path)
    deleting = threading.Timer(0.3, lambda: (shutil.rmtree(path), os.close(held)))
    deleting.start()
    with pytest.raises(checkpoint.Pruned):
        checkpoint.Hold(path)
    deleting.join()


def test_a_reader_goes_ahead_where_the_wait_is_long(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.locks, "WAIT_SECONDS", 0.05)
    path = folder(tmp_path, 2, 7)
    save(path, CONFIG, STATE, WEIGHTS, None)
    held = checkpoint.locks.acquire(path)
    assert load(path).state.step == STATE.step
    os.close(held)
