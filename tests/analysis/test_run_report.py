import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from support.short_runs import start

from mlx_moe.analysis.report import MOST_COLUMNS, MOST_ROWS, render
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.storage import jsonl
from mlx_moe.training.run import open_run

DOCUMENT = Path(__file__).parents[2] / "docs" / "guides" / "report.md"
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>&amp;\u2028"


def text_of(page):
    """What is read on a page before its scripts run."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_one_file_says_it_all(finished, mlxmoe, tmp_path):
    assert mlxmoe("experts", finished, "--sequences", 4, "--backend", "torch").code == 0
    result = mlxmoe("report", finished, "--out", tmp_path / "new" / "page.html")
    assert result.code == 0, result.err
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    text, record = text_of(page), read_record(finished)
    for name, certificate in record.boundaries.items():
        assert name.replace("-", " → ") in text
        assert f"{certificate['loss_before']:.6f} → {certificate['loss_after']:.6f}" in text
    assert text.count("lossless") == 2
    for phase in record.phases:
        assert phase.name in text
        assert phase.model.display_name in text
        for prompt, continuation in phase.event["samples"].items():
            assert " ".join(prompt.split()) in text
            assert " ".join(continuation.split()) in text
    for said in ("2-moe 0", "log_every: 1", "torch", record.data["train"]["sha256"]):
        assert said in text
    assert "Incomplete:" not in text


def test_the_curves_hold_the_rows_of_the_run(finished):
    data, rows = data_of(render(read_record(finished))), jsonl.read(finished / "metrics.jsonl")
    assert data["rows"]["step"] == [row["step"] for row in rows]
    pairs = zip(rows, data["rows"]["cross_entropy"], strict=True)
    losses = [(row["cross_entropy"], shown) for row, shown in pairs if "loss" in row]
    assert len(losses) == 12 + 10 + 8
    assert all(shown == pytest.approx(loss, rel=1e-5) for loss, shown in losses)
    assert data["rows"]["run_step"][-1] == 12 + 10 + 8
    assert [phase["run_step"] for phase in data["phases"]] == [0, 12, 22]
    loads = data["loads"][0]
    assert loads["steps"] == [row["step"] for row in rows if row["phase"] == 2 and "loss" in row]
    assert len(loads["layers"]) == 2
    assert sum(expert[0] for expert in loads["layers"][0]) == pytest.approx(4, abs=0.03)


def test_long_runs_are_thinned(finished):
    record = read_record(finished)
    rows = [row | {"step": step} for step in range(3 * MOST_ROWS) for row in record.phases[1].rows[1:2]]
    rows[17] = rows[17] | {"validation_loss": 1.5}
    long = replace(record, phases=[replace(record.phases[1], rows=rows)])
    data = data_of(render(long))
    assert len(data["rows"]["step"]) in (MOST_ROWS, MOST_ROWS + 1)
    assert 17 in data["rows"]["step"]
    assert len(data["loads"][0]["steps"]) == MOST_COLUMNS


def test_what_the_folder_says_is_escaped(finished):
    record = read_record(finished)
    event = record.phases[0].event | {"samples": {EVIL: EVIL}}
    evil = replace(
        record,
        run=record.run.model_copy(update={"name": EVIL}),
        phases=[replace(record.phases[0], event=event)],
        environment=record.environment | {"command": ["mlxmoe", EVIL], "device": EVIL},
        data=record.data | {"source": {"description": EVIL}},
        experts={"checkpoints": [hostile_experts()]},
    )
    page = render(evil)
    assert "<img" not in page
    assert page.count("<script") == 2
    assert data_of(page)["experts"][0]["layers"][0]["tokens"][0][0]["text"] == EVIL


def hostile_experts():
    layer = {"load": [1.0], "entropy": 0.0, "together": [[1.0]], "distance": [[0.0]], "dead": [], "twins": []}
    token = {"text": EVIL, "occurrences": 9, "share": 1.0, "lift": 1.0}
    return {"phase": 2, "step": 0, "layers": [layer | {"tokens": [[token]]}]}


def test_a_dense_run(dense, mlxmoe, tmp_path):
    assert mlxmoe("report", dense, "--out", tmp_path / "page.html").code == 0
    text = text_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Incomplete:" not in text  # it was begun with --phases 1
    assert "No boundary was crossed" in text
    assert "This run has no experts" in text


def test_an_interrupted_run_and_the_same_resumed(interrupted, mlxmoe, tmp_path):
    assert mlxmoe("report", interrupted).code == 0
    text = text_of((interrupted / "report.html").read_text(encoding="utf-8"))
    assert "phase 2 stopped at step 5 of 10; phase 3 was not begun; no experts.json" in text
    assert "5 of 10" in text
    assert text.count("lossless") == 1
    start(open_run(interrupted), interrupted)
    assert mlxmoe("report", interrupted).code == 0
    resumed = (interrupted / "report.html").read_text(encoding="utf-8")
    assert "stopped at" not in text_of(resumed)
    assert data_of(resumed)["rows"]["run_step"].count(12 + 5) == 1


def test_a_failed_boundary(interrupted):
    file = interrupted / "boundaries" / "1-2.json"
    failed = {"passed": False, "loss_jump": None, "logit_differences": [0.02, None, 0.0], "max_logit_difference": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | failed | {"routing_flips": 3, "allowed_lossy": True}))
    text = text_of(render(read_record(interrupted)))
    for said in ("changed the model ✗", "not finite", "3 routing ties", "--allow-lossy"):
        assert said in text


def test_what_cannot_be_read_is_said(dense, mlxmoe, tmp_path):
    result = mlxmoe("report", tmp_path)
    assert result.code == 2
    assert f"no run at {tmp_path}" in result.err
    (tmp_path / "config.yaml").write_text((dense / "config.yaml").read_text())
    assert "no rows in metrics.jsonl" in mlxmoe("report", tmp_path).err
    (tmp_path / "metrics.jsonl").write_text("{]\n")
    assert "cannot read" in mlxmoe("report", tmp_path).err
    result = mlxmoe("report", dense, "--out", dense / "config.yaml" / "page.html")
    assert result.code == 2
    assert "cannot write" in result.err


def test_every_command_of_the_document_runs(finished, mlxmoe, monkeypatch):
    monkeypatch.chdir(finished.parent)
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        result = mlxmoe(*(word.replace("RUN", "finished") for word in shlex.split(command)[1:]))
        assert result.code == 0, f"{command}\n{result.err}"
