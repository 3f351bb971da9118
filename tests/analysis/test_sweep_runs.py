import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from support.small_experiments import SIZE

from mlx_moe.analysis.sweeps import expand, load_sweep
from mlx_moe.storage import jsonl, locks
from mlx_moe.training.stopping import SIGNALS

SWEEP = {
    "name": "s",
    "preset": "demo",
    "overrides": {"phases.dense.steps": 6, "data.tokenizer": "bpe:300"},
    "axes": {
        "arm": {
            "good": {},
            "explodes": {"phases.dense.learning_rate": 1e30, "optimizer.max_grad_norm": 1e30},
            "long": {"phases.dense.steps": 800, "training.checkpoint_every": 800, "training.eval_every": 800},
        }
    },
}
OPTIONS = [*SIZE, "--backend", "torch", "--device", "cpu"]


LONG = {"phases.dense.steps": 800, "training.checkpoint_every": 100, "training.eval_every": 200}


def begin(folder, axes, *options):
    """Start a sweep as a process of its own: (its file, its folder, the process)."""
    file, out = folder / "s.yaml", folder / "out"
    file.write_text(yaml.safe_dump(SWEEP | {"axes": axes}, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"MLXMOE_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "sweep", file, "--out", out, *options, *OPTIONS],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return file, out, process


def await_files(process, *files):
    until = time.monotonic() + 120
    while process.poll() is None and not all(path.exists() for path in files) and time.monotonic() < until:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A sweep of which one run finished, one failed, and one was interrupted: (its file, its folder, the process)."""
    file, out, process = begin(tmp_path_factory.mktemp("sweep"), SWEEP["axes"], "--jobs", "2")
    await_files(process, out / "good" / "phases", out / "explodes" / "failure.json", out / "long" / "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    return file, out, process.returncode, said


def statuses(out):
    return {row["run"]: row["status"] for row in jsonl.read(out / "results.jsonl")}


def test_an_interrupted_sweep_says_how_it_stands(stopped):
    file, out, code, said = stopped
    assert code == 128 + signal.SIGINT, said
    assert "waiting for 1 run to save" in said
    assert f"resume with: mlxmoe sweep {file} -o model.d_model=32" in said
    assert f"--jobs 2 --out {out} --backend torch --device cpu" in said
    assert statuses(out) == {"good": "finished", "explodes": "failed", "long": "interrupted"}
    assert list((out / "long").glob("phases/*/checkpoints/step-*")), "the interrupted run did not save"


def test_a_failure_is_kept_and_named(stopped):
    _, out, _, said = stopped
    reason = json.loads((out / "explodes" / "failure.json").read_text())["reason"]
    assert "lower the learning rate" in reason
    assert f"explodes: failed: {reason}"[:60] in said.replace("\n", " ")


def test_going_on_runs_only_what_is_left(stopped, mlxmoe):
    file, out, *_ = stopped
    step = max(int(path.name[5:]) for path in (out / "long").glob("phases/*/checkpoints/step-*"))
    times = {path: path.stat().st_mtime_ns for path in (out / "good").rglob("*")}
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 1
    assert "1 of 3 runs did not finish: explodes" in result.err
    assert statuses(out) == {"good": "finished", "explodes": "failed", "long": "finished"}
    log = (out / "logs" / "long.txt").read_text()
    assert f"resuming from phases/1-dense/checkpoints/step-{step}" in log
    assert "not bit for bit" not in log  # though each run has more threads by now
    assert {path: path.stat().st_mtime_ns for path in (out / "good").rglob("*")} == times


def test_what_failed_is_set_aside_and_run_once_more(stopped, mlxmoe):
    file, out, *_ = stopped
    failed = {path.name: path.read_bytes() for path in (out / "explodes").iterdir() if path.is_file()}
    result = mlxmoe("sweep", file, "--out", out, "--retry", *OPTIONS)
    assert result.code == 1
    assert "explodes is now explodes.failed" in result.out
    aside = {path.name: path.read_bytes() for path in (out / "explodes.failed").iterdir() if path.is_file()}
    assert aside == failed
    assert statuses(out) == {"good": "finished", "explodes": "failed", "long": "finished"}
    assert (out / "explodes" / "failure.json").is_file()


def test_another_sweep_does_not_mix_in(stopped, mlxmoe):
    file, out, *_ = stopped
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS, "-o", "training.batch_size=2")
    assert result.code == 2
    assert "holds another sweep: good (3 such) has another config; name another --out" in result.err
    result = mlxmoe("sweep", file, "--out", out / "good", *OPTIONS)
    assert "is not empty and holds no sweep" in result.err


def test_a_dry_run_only_names(stopped, mlxmoe, tmp_path):
    result = mlxmoe("sweep", stopped[0], "--dry-run", "--out", tmp_path / "none")
    assert result.out.split() == ["good", "explodes", "long"]
    assert not (tmp_path / "none").exists()


def test_runs_end_with_a_sweep_that_is_killed_and_the_next_one_resumes_them(tmp_path, mlxmoe):
    arms = {"one": LONG, "two": LONG | {"phases.dense.learning_rate": 1e-4}}
    file, out, process = begin(tmp_path, {"arm": arms}, "--jobs", "2")
    await_files(process, out / "one" / "metrics.jsonl", out / "two" / "metrics.jsonl")
    process.kill()
    process.communicate()
    result = mlxmoe("sweep", file, "--out", out, "--jobs", "2", *OPTIONS)
    assert result.code == 0, result.out + result.err
    assert statuses(out) == {"one": "finished", "two": "finished"}
    assert not list(out.glob("*/failure.json"))
    assert not [path for path in out.rglob(".*") if path.name.startswith(".mlxmoe")]
    for run in ("one", "two"):
        steps = [row["step"] for row in jsonl.read(out / run / "metrics.jsonl")]
        assert steps == sorted(set(steps))
        log = (out / "logs" / f"{run}.txt").read_text()
        assert log.count("backend    torch") == 2, "it was not interrupted and resumed"
        assert "SIGTERM: stopped" in log


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_every_signal_lets_the_runs_save(number, tmp_path):
    _, out, process = begin(tmp_path, {"arm": {"it's long": LONG}})
    await_files(process, out / "it's long" / "metrics.jsonl")
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 128 + number, said
    assert f"{number.name}: stopped; resume with: mlxmoe sweep {tmp_path / 's.yaml'} " in said
    assert statuses(out) == {"it's long": "interrupted"}
    assert list(out.glob("*/phases/*/checkpoints/step-*")), "the interrupted run did not save"


@pytest.fixture
def begun(tmp_path):
    """A sweep's folder of two runs, of which one has begun: (its file, its folder)."""
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(SWEEP | {"axes": {"arm": {"good": {}}}}), encoding="utf-8")
    planned = expand(load_sweep(str(file)), OPTIONS[1 : len(SIZE) : 2])
    (out / "good").mkdir(parents=True)
    (out / "logs").mkdir()
    (out / "sweep.json").write_text(json.dumps({run.name: run.to_json() for run in planned}))
    (out / "good" / "failure.json").write_text(json.dumps({"reason": "it exploded", "exit_code": 1}))
    return file, out


def test_one_sweep_at_a_time(begun, mlxmoe):
    file, out = begun
    held = locks.acquire(out)
    before = sorted(out.rglob("*"))
    result = mlxmoe("sweep", file, "--out", out, "--retry", *OPTIONS)
    os.close(held)
    assert (result.code, result.out) == (2, "")
    assert f"another process is sweeping in {out}; wait for it, or name another --out" in result.err
    assert sorted(out.rglob("*")) == before


def test_the_runs_of_a_sweep_that_was_killed_are_waited_for(begun, mlxmoe):
    file, out = begun
    held = locks.acquire(out / "logs")
    threading.Timer(1, lambda: os.close(held)).start()
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert "waiting for runs of a sweep that was killed to save" in result.out
    assert "1 of 1 runs did not finish: good" in result.err


@pytest.mark.parametrize("options", [(), ("--retry",)])
def test_a_run_that_another_process_trains_is_left_alone(options, begun, mlxmoe):
    file, out = begun
    held = locks.acquire(out / "good")
    result = mlxmoe("sweep", file, "--out", out, *options, *OPTIONS)
    assert result.code == 1
    assert "good: running elsewhere" in result.out
    assert "1 of 1 runs did not finish: good" in result.err
    os.close(held)
    assert not (out / "good.failed").exists()
    assert (out / "good" / "failure.json").is_file()


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"good": 3}', '{"good": {}}', '{"good": {"choices": 1}}', "[" * 9999]
)
def test_a_damaged_sweep_is_named(text, begun, mlxmoe):
    file, out = begun
    (out / "sweep.json").write_text(text)
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert str(out / "sweep.json") in result.err
    assert result.err.count("\n") == 1
    assert (out / "sweep.json").read_text() == text


def test_a_run_that_cannot_be_started(begun, mlxmoe, monkeypatch):
    file, out = begun
    shutil.rmtree(out / "good")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert "cannot start run good: No such file or directory; with fewer --jobs, or later, resume with: " in result.err
    (out / "logs" / "good.txt").unlink()
    os.mkfifo(out / "logs" / "good.txt")
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert not (out / "good").exists()


@pytest.mark.parametrize("device", ["", "tpu"])
def test_a_device_that_is_none(device, begun, mlxmoe):
    result = mlxmoe("sweep", begun[0], "--out", begun[1], *SIZE, "--device", device)
    assert result.code == 2
    assert "must be one of auto, cpu, gpu" in result.err


def test_a_run_depends_on_nothing_around_it(tmp_path, mlxmoe, monkeypatch):
    file, out, place = tmp_path / "s.yaml", tmp_path / "out", tmp_path / "place"
    file.write_text(yaml.safe_dump(SWEEP | {"axes": {"arm": {"good": {}}}}), encoding="utf-8")
    place.mkdir()
    for name in ("json", "random", "numpy", "torch"):  # which Python would take from the working folder
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(place)
    settings = {"PYTHONINSPECT": "1", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 0, (out / "logs" / "good.txt").read_text()
    assert not (tmp_path / "ran").exists()
    assert "\x1b" not in (out / "logs" / "good.txt").read_text()


@pytest.mark.parametrize("kind", ["fifo", "file"])
def test_what_is_no_run_is_refused_at_once(kind, mlxmoe, tmp_path):
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(SWEEP | {"axes": {"arm": {"good": {}}}}))
    (out / "logs").mkdir(parents=True)
    (out / "sweep.json").write_text("{}")
    os.mkfifo(out / "good") if kind == "fifo" else (out / "good").touch()
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {out}/good is no folder, as a run's must be; move it away\n"


def test_data_that_is_not_there_is_said_before_anything_is_written(mlxmoe, tmp_path):
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(SWEEP))
    result = mlxmoe("sweep", file, "--data", tmp_path / "nowhere.txt", "--out", out, *OPTIONS)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no file or folder" in result.err
    assert not out.exists()


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory, mlxmoe):
    """A sweep of one seed that is finished, and the file of one that adds another: (file, folder)."""
    folder = tmp_path_factory.mktemp("seeds")
    one, two, out = folder / "one.yaml", folder / "two.yaml", folder / "out"
    for file, seeds in ((one, [0]), (two, [0, 1])):
        file.write_text(yaml.safe_dump(SWEEP | {"axes": {"seed": seeds}}), encoding="utf-8")
    result = mlxmoe("sweep", one, "--out", out, *OPTIONS)
    assert result.code == 0, result.err
    return two, out


@pytest.mark.parametrize("name", ["samples.md", "metrics.jsonl", "notes.txt"])
def test_what_a_user_put_where_a_run_would_go_stays(name, two_seeds, mlxmoe, tmp_path):
    file, out = two_seeds[0], shutil.copytree(two_seeds[1], tmp_path / "out")
    (out / "seed=1").mkdir()
    (out / "seed=1" / name).write_text("mine\n")
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert "seed=1 is not empty, and no run of the sweep; move it away" in result.err
    assert (out / "seed=1" / name).read_text() == "mine\n"
    assert [path.name for path in (out / "seed=1").iterdir()] == [name]


def test_another_run_is_not_taken_for_one_of_the_sweep(two_seeds, mlxmoe, tmp_path):
    file, out = two_seeds[0], shutil.copytree(two_seeds[1], tmp_path / "out")
    shutil.copytree(out / "seed=0", out / "seed=1")
    before = (out / "results.csv").read_text()
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert "seed=1 holds another run than the sweep's: its seed is 0, and the sweep's 1; move it away" in result.err
    assert (out / "results.csv").read_text() == before


def test_a_run_with_experts_is_not_taken_for_a_dense_one(two_seeds, mlxmoe, tmp_path):
    file, out = two_seeds[0], shutil.copytree(two_seeds[1], tmp_path / "out")
    shutil.copytree(out / "seed=0", out / "seed=1")
    config = yaml.safe_load((out / "seed=0" / "config.yaml").read_text())
    config["seed"], config["model"]["moe"] = 1, {"n_experts": 2, "top_k": 1}
    (out / "seed=1" / "config.yaml").write_text(yaml.safe_dump(config))
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 2
    assert "its model.moe.n_experts is 2, and the sweep's None" in result.err


def test_a_finished_sweep_needs_its_data_no_more(mlxmoe, tmp_path, monkeypatch):
    """And stands as it is, from wherever the command is called."""
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(SWEEP | {"axes": {"arm": {"good": {}}}}), encoding="utf-8")
    (tmp_path / "a.txt").write_text("One day a cat sat on a mat and was glad. " * 400)
    monkeypatch.chdir(tmp_path)
    words = ("sweep", file, "--data", "a.txt", "--out", out, *OPTIONS)
    result = mlxmoe(*words)
    assert result.code == 0, result.err
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = mlxmoe(*words)
    assert result.code == 0, result.err


def test_a_run_that_does_not_say_what_it_was_begun_with_is_resumed(two_seeds, mlxmoe, tmp_path):
    file, out = two_seeds[0], shutil.copytree(two_seeds[1], tmp_path / "out")
    (out / "seed=0" / "history.jsonl").unlink()
    (out / "seed=0" / "run.json").unlink()
    (out / "seed=1").mkdir()
    (out / "seed=1" / "Thumbs.db").write_bytes(b"the system's")
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 0, result.err
    assert statuses(out) == {"seed=0": "finished", "seed=1": "finished"}


def test_a_folder_whose_sweep_names_no_run_is_not_ours(two_seeds, mlxmoe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in {"sweep.json": "{}", "results.csv": "mine", "summary.json": "mine"}.items():
        (out / name).write_text(text)
    result = mlxmoe("sweep", two_seeds[0], "--out", out, *OPTIONS)
    assert result.code == 2
    assert "holds no sweep" in result.err
    assert (out / "results.csv").read_text() == (out / "summary.json").read_text() == "mine"
