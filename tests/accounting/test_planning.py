import importlib
import json

import pytest

from mlx_moe.accounting.estimate import Workload, fit, seconds, site_of
from mlx_moe.accounting.machines import choose_machine
from mlx_moe.config import EngineConfig, OptimizerConfig
from mlx_moe.presets import load_architecture, load_run
from mlx_moe.training.run_plan import make_plan

PHASES = ["1-dense", "2-moe", "3-large-moe"]


def test_json_holds_every_phase_and_machine(mlxmoe):
    result = mlxmoe("plan", "--preset", "demo", "--backend", "torch", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert list(plan["phases"]) == PHASES
    assert plan["phases"]["1-dense"]["tokens"] == 300 * 16 * 128
    assert plan["machines"][0]["machine"].startswith("this machine")
    assert plan["machines"][0]["matmul_flops_per_s"] > 0
    assert plan["warnings"] == []
    for machine in plan["machines"]:
        for phase in machine["phases"].values():
            memory = phase["memory"]
            assert memory["peak"] == max(memory["moments"].values())
            assert phase["fits"] == (phase["largest_batch"] >= 16)
            assert phase["seconds"] > 0


def test_the_large_phase_on_a_32_gb_mac(mlxmoe):
    result = mlxmoe("plan", "--machine", "M2 Max 32GB")
    assert result.code == 0, result.err
    out = " ".join(result.out.split())
    assert "1.44 B" in out
    assert "warning" not in out
    result = mlxmoe("plan", "--machine", "M1 16GB")
    out = " ".join(result.out.split())
    assert "warning: 3-large-moe needs" in out
    assert "2-moe needs" not in out


@pytest.mark.parametrize("machine", ["M1 8GB", "T4 16GB", "M1 Pro 16GB"])
def test_every_way_out_leads_out(machine):
    work = Workload("large", load_architecture("gpt2"), OptimizerConfig(), EngineConfig(), batch_size=64, steps=10)
    found = fit(work, site_of(*choose_machine(machine), work.engine))
    assert not found.fits
    assert found.remedies
    for way in found.remedies:
        overrides = [word for word in way.split() if word != "-o"]
        run = load_run("gpt2", overrides=["training.batch_size=64", *overrides])
        changed = Workload("large", run.model, run.optimizer, run.engine, run.training.batch_size, 10)
        assert fit(changed, site_of(*choose_machine(machine), run.engine)).fits, way


def test_what_no_setting_helps(mlxmoe):
    result = mlxmoe("plan", "--machine", "M1 8GB", "-o", "model.d_model=4096")
    assert "a smaller model or a larger machine" in " ".join(result.out.split())


def test_the_largest_batch_is_the_largest():
    site = site_of(*choose_machine("M1 Pro 32GB"), EngineConfig())
    work = Workload("dense", load_architecture("simple"), OptimizerConfig(), EngineConfig(), batch_size=8, steps=1)
    largest = fit(work, site).largest_batch
    at = {
        n: fit(Workload("dense", work.model, work.optimizer, work.engine, n, 1), site).fits
        for n in (largest, largest + 1)
    }
    assert at == {largest: True, largest + 1: False}


def test_time_follows_tokens_and_precision():
    machine = choose_machine("H100 80GB")
    work = Workload("dense", load_architecture("simple"), OptimizerConfig(), EngineConfig(), batch_size=8, steps=100)
    twice = Workload("dense", work.model, work.optimizer, work.engine, batch_size=8, steps=200)
    site = site_of(*machine, work.engine)
    assert site.precision == "bf16"
    assert seconds(twice, site) == pytest.approx(2 * seconds(work, site))
    assert seconds(work, site_of(*machine, EngineConfig(precision="fp32"))) > 2 * seconds(work, site)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "M2 Max 33GB"], "32, 64, 96 GB"),
        (["--machine", "Cray"], "known: M1"),
        (["--backend", "jax"], "auto, mlx, torch"),
        (["--backend", "torch", "--machine", "M1 16GB"], "leave out --machine 'M1 16GB'"),
        (["-o", "model.d_modl=4"], "model.d_modl"),
    ],
)
def test_bad_input_is_one_line(mlxmoe, arguments, said):
    result = mlxmoe("plan", *arguments)
    assert result.code == 2
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("module", ["mlx_moe.model.device", "torch_ref.device"])
def test_speed_of_this_machine(module, monkeypatch):
    speed = importlib.import_module(module)
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    assert 1e8 < speed.measure_flops_per_s("fp32", "cpu") < 1e15
    assert speed.device_name("cpu")
    assert speed.usable_bytes("cpu") > 2**30


def test_half_precision_is_left_to_cuda():
    plan = make_plan(load_run("demo"), machine="M1 16GB")
    assert [site.precision for site in plan.sites] == ["fp32", "fp32", "fp32", "bf16", "bf16"]


@pytest.mark.parametrize("command", ["params", "plan"])
def test_a_trained_vocabulary_is_counted(mlxmoe, command):
    def parameters(*options):
        said = json.loads(mlxmoe(command, "--preset", "demo", "--json", *options).out)
        phase = said["1-dense"] if command == "params" else said["phases"]["1-dense"]["parameters"]
        return phase["total"]

    assert parameters() == 1_055_488
    assert parameters("-o", "data.tokenizer=bpe:4096") == 1_055_488 + 2048 * 128
    assert parameters("-o", "model.vocab_size=3000") == 1_055_488 + (3000 - 2048) * 128
