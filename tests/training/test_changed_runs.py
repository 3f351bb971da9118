"""What was changed, or lost, in a run's folder or around it is said when the run is resumed, and harms nothing."""

import json
import re
import shutil

import pytest
import yaml
from support.short_runs import SIZE

from mlx_moe.storage import checkpoint, jsonl

BEGIN = ("train", "--preset", "llama", *(word for override in SIZE for word in ("-o", override)))
ON_CPU = ("--backend", "torch", "--device", "cpu")


@pytest.fixture(scope="module")
def whole(mlxmoe, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    result = mlxmoe(*BEGIN, *ON_CPU, "--phases", 2, "--steps", 6, "--out", run)
    assert result.code == 0, result.err
    return run


@pytest.fixture
def cut(whole, tmp_path):
    """The same run as it was after step 5 of phase 2."""
    run = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(run / "phases/2-moe/checkpoints/step-6")
    history = (run / "history.jsonl").read_text().splitlines(keepends=True)
    (run / "history.jsonl").write_text("".join(history[:-1]))
    return run


def resumed(mlxmoe, run, *options):
    """All that resuming a run printed, in one line."""
    result = mlxmoe("train", "--resume", run, *options)
    assert result.code == 0, result.err
    return " ".join(f"{result.out} {result.err}".split())


def assert_same_weights(one, other):
    first, second = (checkpoint.load(run).weights for run in (one, other))
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def test_nothing_is_said_where_nothing_has_changed(cut, whole, mlxmoe):
    said = resumed(mlxmoe, cut)
    assert "warning" not in said
    assert "not bit for bit" not in said
    assert_same_weights(cut, whole)


def test_without_the_record_of_its_data(cut, mlxmoe):
    (cut / "data.json").unlink()
    assert "data.json is missing, so it cannot be checked that the tokens are unchanged" in resumed(mlxmoe, cut)


@pytest.mark.parametrize("is_finished", [False, True])
def test_without_its_metrics(is_finished, cut, whole, mlxmoe, tmp_path):
    """What the lost rows said is not made up of those that are left."""
    run = cut
    if is_finished:  # and killed before it said what it came to
        run = shutil.copytree(whole, tmp_path / "finished")
        history = (run / "history.jsonl").read_text().splitlines(keepends=True)
        (run / "history.jsonl").write_text("".join(history[:-1]))
    (run / "metrics.jsonl").unlink()
    said = resumed(mlxmoe, run)
    assert "metrics.jsonl lacks rows of phase 2 up to step" in said
    (phase,) = [row for row in jsonl.read(run / "history.jsonl") if (row["event"], row["phase"]) == ("phase", 2)]
    assert phase["first_loss"] is None
    assert (phase["last_loss"] is None) == is_finished
    assert_same_weights(run, whole)


@pytest.mark.parametrize("kept", [(0,), (0, 1), range(1, 6)])
def test_without_some_of_its_metrics(kept, cut, mlxmoe):
    rows = [row for row in jsonl.read(cut / "metrics.jsonl") if row["phase"] == 1 or row["step"] in kept]
    (cut / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "metrics.jsonl lacks rows of phase 2 up to step 5" in resumed(mlxmoe, cut)


def test_without_its_last_rows_a_phase_has_no_last_loss(whole, mlxmoe, tmp_path):
    """And not that of its birth."""
    run = shutil.copytree(whole, tmp_path / "run")
    for name, key, kept in (("metrics.jsonl", "step", 0), ("history.jsonl", "phase", 1)):
        rows = [row for row in jsonl.read(run / name) if row[key] == kept]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = resumed(mlxmoe, run)
    assert "metrics.jsonl lacks rows of phase 2 up to step 6" in said
    assert "history.jsonl lacks the row of boundary 2" in said
    assert jsonl.read(run / "history.jsonl")[-1]["last_validation_loss"] is None


def test_a_new_run_is_compared_with_no_earlier_one(whole, mlxmoe, tmp_path):
    """Of a run that was killed as it began, run.json may be there."""
    run = tmp_path / "run"
    run.mkdir()
    identity = json.loads((whole / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | {"threads": 7, "differences": ["backend torch, was mlx"]}))
    result = mlxmoe(*BEGIN, *ON_CPU, "--phases", 1, "--steps", 2, "--out", run)
    assert result.code == 0, result.err
    assert "not bit for bit" not in result.out
    assert json.loads((run / "run.json").read_text())["differences"] == []


def test_without_its_history(cut, mlxmoe):
    (cut / "history.jsonl").unlink()
    assert "history.jsonl lacks the row of boundary 2; its contents are lost" in resumed(mlxmoe, cut)


@pytest.mark.parametrize("name", ["loss_jump", "max_logit_difference", "loss_before"])
def test_a_boundary_without_a_figure(name, cut, mlxmoe):
    rows = jsonl.read(cut / "history.jsonl")
    (cut / "history.jsonl").write_text(
        "".join(json.dumps(row | {name: None} if row["event"] == "boundary" else row) + "\n" for row in rows)
    )
    assert "—" in resumed(mlxmoe, cut)


@pytest.mark.parametrize("name", ["step_ms", "tokens", "cross_entropy"])
def test_rows_without_a_figure(name, cut, mlxmoe):
    rows = jsonl.read(cut / "metrics.jsonl")
    (cut / "metrics.jsonl").write_text(
        "".join(json.dumps({key: value for key, value in row.items() if key != name}) + "\n" for row in rows)
    )
    resumed(mlxmoe, cut)


def test_a_phase_that_is_made_longer_is_told_anew(mlxmoe, tmp_path):
    run = tmp_path / "run"
    assert mlxmoe(*BEGIN, *ON_CPU, "--phases", 1, "--steps", 3, "--out", run).code == 0
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 3\n", "steps: 60\n", 1))
    said = resumed(mlxmoe, run)
    (phase,) = [row for row in jsonl.read(run / "history.jsonl") if row["event"] == "phase"]
    last = jsonl.read(run / "metrics.jsonl")[-1]
    assert (phase["step"], phase["last_validation_loss"]) == (60, last["validation_loss"])
    assert f"{last['validation_loss']:.4f}" in said
    samples = (run / "samples.md").read_text()
    assert all(continuation.strip() in samples for continuation in phase["samples"].values())


def test_a_phase_that_is_made_shorter_keeps_its_steps(cut, mlxmoe):
    config = (cut / "config.yaml").read_text()
    (cut / "config.yaml").write_text(config.replace("steps: 6\n", "steps: 4\n"))
    assert "phase 2: nothing left to train after step 5" in resumed(mlxmoe, cut)
    assert jsonl.read(cut / "history.jsonl")[-1]["step"] == 5


def edit_phases(run, edit):
    config = yaml.safe_load((run / "config.yaml").read_text())
    edit(config["phases"])
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_a_phase_that_is_removed_is_not_trained(cut, whole, mlxmoe):
    identity = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(identity | {"last_phase": 3}))
    edit_phases(cut, lambda phases: phases.pop("large_moe"))
    assert "phases dense, moe, was dense, moe, large_moe" in resumed(mlxmoe, cut)
    assert_same_weights(cut, whole)


def test_a_phase_that_is_added_is_named(cut, mlxmoe):
    edit_phases(cut, lambda phases: phases.update(larger=phases["large_moe"] | {"d_model": 64}))
    said = resumed(mlxmoe, cut)
    assert "phases dense, moe, large_moe, larger, was dense, moe, large_moe (trained to phase 2; --phases 4" in said


@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_user_wrote_into_the_config_stays(is_link, cut, mlxmoe, tmp_path):
    text = "# mine\n" + (cut / "config.yaml").read_text()
    file = tmp_path / "base.yaml" if is_link else cut / "config.yaml"
    file.write_text(text)
    if is_link:
        (cut / "config.yaml").unlink()
        (cut / "config.yaml").symlink_to(file)
    resumed(mlxmoe, cut)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("threads", 60_000, r"threads \d+, was 60000"),
        ("instructions", "SSE2", r"instructions {now}, was SSE2"),
        ("versions", {"torch": "1.0"}, r"torch {now}, was 1\.0"),
    ],
)
def test_what_a_machine_cannot_give_is_said(key, value, said, cut, mlxmoe):
    identity = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(identity | {key: value}))
    now = identity[key]["torch"] if key == "versions" else identity[key]
    assert re.search(f"not bit for bit: {said.replace('{now}', re.escape(str(now)))}", resumed(mlxmoe, cut))


def test_a_run_that_has_saved_nothing_starts_from_the_same_model(whole, mlxmoe, tmp_path):
    """Where the model that it starts from has changed, it does not."""
    model, run = tmp_path / "model", tmp_path / "run"
    assert mlxmoe("export", whole / "phases/1-dense", model, "--no-verify").code == 0
    (model / "original.safetensors").mkdir()  # which is none of the model's files
    words = ("--from", model, "--phases", 1, "--steps", 2, "--data", "stories", "-o", "data.n_documents=60")
    sizes = ("-o", "training.batch_size=4", "-o", "training.eval_sequences=8", "-o", "data.validation_fraction=0.2")
    result = mlxmoe("train", *words, *sizes, *ON_CPU, "--out", run)
    assert result.code == 0, result.err
    for name in ("phases", "metrics.jsonl", "history.jsonl"):  # as a kill before the first checkpoint leaves it
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    file = model / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-4] + b"\0\0\0\0")
    result = mlxmoe("train", "--resume", run)
    assert result.code == 2
    assert "holds other weights than the run began with" in result.err
    file.write_bytes(before)
    assert "not bit for bit" not in resumed(mlxmoe, run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", 5), "leave out --steps"),
        (("--seed", 3, "--data", "stories"), "leave out --data, --seed"),
        (("--phases", "2,3"), "the run begins with phase 1; take --phases 3"),
    ],
)
def test_what_resuming_does_not_take_is_named(options, said, cut, mlxmoe):
    result = mlxmoe("train", "--resume", cut, *options)
    assert result.code == 2
    assert result.err.rstrip().endswith(said)
