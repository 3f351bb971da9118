"""Models upcycled and grown on disk, tensor by tensor: the same bits as in memory, little memory, all or nothing."""

import json
import resource
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.checkpoints import create
from support.published_models import our_logits, random_tokens, save
from support.small_models import rough_weights, small_model

from mlx_moe.config import MoEConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.convert import transfers
from mlx_moe.convert.probes import random_probes
from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model
from mlx_moe.parameters import initialize, parameter_table, shapes
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import TrainerState
from mlx_moe.training.backend import Backend, choose_backend
from mlx_moe.training.certify import ChangedModel, certify_streamed, permute_units, rounding_floor
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import apply_numpy, apply_streaming
from mlx_moe.transfer.upcycling import plan_phase, plan_upcycling

EXPERTS = MoEConfig(n_experts=4, top_k=2)
DENSE = small_model("llama")
MIXTURE = small_model("llama", moe=EXPERTS)
IN_ONE_LAYER = MoEConfig(n_experts=4, top_k=2, layers=(1,), shared_d_ff=24)
METHODS = UpcyclePhaseConfig(n_experts=4, every=2, granularity=2, shared=True)
PLANS = {
    "experts": lambda config: plan_upcycling(config, EXPERTS),
    "every method": lambda config: plan_phase(config, METHODS, seed=0),
    "twice as wide": lambda config: plan_growth(config, grow_config(config, d_model=96, n_layers=2)),
    "wider": lambda config: plan_growth(config, grow_config(config, d_model=72, n_layers=2)),
    "deeper": lambda config: plan_growth(config, grow_config(config, d_model=48, n_layers=5)),
}


@pytest.fixture(params=["mlx", "torch"])
def backend(request):
    return Backend(request.param, "")


def transfer(source, plan, out, backend, allow_lossy=False):
    probes, limits = random_probes(source.config, 3), VerificationConfig()
    with creating(out) as partial:
        return transfers.transfer_checkpoint(source, plan, partial, backend, "cpu", limits, allow_lossy, probes)


def saved(config, path):
    checkpoint.save(path, config, TrainerState(1, 0, "torch"), rough_weights(config, 0), None)
    return checkpoint.load(path)


@pytest.mark.parametrize("name", PLANS)
def test_a_checkpoint_on_disk_is_the_plan_applied_in_memory(name, tmp_path, backend):
    source = saved(DENSE if name in ("experts", "every method") else MIXTURE, tmp_path / "source")
    plan = PLANS[name](source.config)
    done = transfer(source, plan, tmp_path / "out", backend)
    assert done.certificate.passed
    found, expected = checkpoint.load(tmp_path / "out"), apply_numpy(plan, dict(source.weights))
    assert found.config == plan.target_config
    assert done.bytes_written == sum(array.nbytes for array in expected.values())
    for tensor, array in expected.items():
        assert found.weights[tensor].tobytes() == array.tobytes(), tensor


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_published_model_on_disk_too(name, dtype, options, tmp_path):
    save(name, tmp_path / "theirs", dtype, **options)
    source = open_model(tmp_path / "theirs")
    plan = PLANS["experts"](source.config)
    assert transfer(source, plan, tmp_path / "out", choose_backend("torch")).certificate.passed
    found = checkpoint.load(tmp_path / "out")
    for tensor, array in apply_numpy(plan, dict(source.weights)).items():
        assert found.weights[tensor].tobytes() == array.tobytes(), tensor


STREAMED = ("simple", "llama", "smollm", "gpt2-post")


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("moe", [None, EXPERTS, IN_ONE_LAYER], ids=["dense", "experts", "one layer"])
def test_a_layer_at_a_time_is_the_same_model(name, moe, backend):
    config = small_model(name, moe=moe)
    weights, tokens = rough_weights(config, 0), random_probes(config, 2)[:, :-1]
    streamed = backend.streamed(config, weights, "cpu")
    whole = backend.trainer(config, weights, device="cpu")
    logits = whole.logits(tokens)
    np.testing.assert_allclose(np.stack(list(streamed.each_logits(tokens))), logits, atol=2e-6)
    free, expected = streamed.routed_logits(tokens), whole.routed_logits(tokens)
    np.testing.assert_allclose(free.logits_BTV, logits, atol=2e-6)
    np.testing.assert_array_equal(free.experts_LNK, expected.experts_LNK)
    if moe:
        np.testing.assert_allclose(free.router_logits_LNE, expected.router_logits_LNE, atol=2e-6)
        other = (free.experts_LNK + 1) % 4
        forced = streamed.routed_logits(tokens, other)
        np.testing.assert_array_equal(forced.experts_LNK, other)
        np.testing.assert_allclose(forced.logits_BTV, whole.routed_logits(tokens, other).logits_BTV, atol=2e-6)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "experts"])
def test_large_logits_are_judged_by_what_rounding_does(config, backend):
    """Logits in the thousands: no float32 computation gets them to 1e-4, but a change of one in 1e5 is found."""
    weights = rough_weights(config, 0)
    weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(3e3)
    plan = plan_growth(config, grow_config(config, d_model=72, n_layers=3))
    grown = apply_numpy(plan, weights)
    before = backend.streamed(config, weights, "cpu")
    permuted = backend.streamed(config, permute_units(config, weights), "cpu")

    def certificate(after):
        after = backend.streamed(plan.target_config, after, "cpu")
        return certify_streamed(VerificationConfig(), before, permuted, after, random_probes(config, 4))

    found = certificate(grown)
    assert found.max_logit_difference > 1e-4
    assert 0 < found.rounding_floor < 0.1
    assert found.passed
    down = "layers.0.mlp.experts.down_proj.weight" if config.moe else "layers.0.mlp.down_proj.weight"
    assert not certificate(grown | {down: grown[down] * np.float32(1 + 1e-4)}).passed


def test_the_floor_of_rounding_is_small_but_not_zero(backend):
    for config in (DENSE, MIXTURE):
        weights = rough_weights(config, 0)
        models = [backend.streamed(config, each, "cpu") for each in (weights, permute_units(config, weights))]
        assert 1e-8 < rounding_floor(*models, random_probes(config, 2)[:, :-1]) < 1e-5


def test_no_tensor_is_in_memory_as_a_whole_more_than_once(tmp_path):
    """Padded and scaled on the way, beyond what is mapped."""
    config = small_model("llama", vocab_size=64, d_model=320, n_layers=1, d_ff=1280, moe={"n_experts": 8})
    source = checkpoint.Checkpoint(tmp_path, config, TrainerState(2, 0, "torch"), initialize(config, 0))
    checkpoint.save(tmp_path / "source", config, source.state, source.weights, None)
    source = checkpoint.load(tmp_path / "source")
    plan = plan_growth(config, grow_config(config, d_model=512, n_layers=2))
    largest = 4 * max(np.prod(parameter.shape) for parameter in parameter_table(plan.target_config))
    tracemalloc.start()
    try:
        create(tmp_path / "out", plan.target_config, source.state, apply_streaming(plan, source.weights))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest > 30e6
    assert peak < largest


def test_what_changes_the_model_is_not_kept(tmp_path, backend):
    source = saved(DENSE, tmp_path / "source")
    plan = PLANS["experts"](DENSE)
    wrong = [tensor for tensor in plan.tensors if tensor.target != "norm.weight"]
    other = [tensor for tensor in plan.tensors if tensor.target == "layers.0.input_layernorm.weight"]
    norm = replace(other[0], target="norm.weight")
    plan = replace(plan, tensors=(*wrong, norm))
    with pytest.raises(ChangedModel) as changed:
        transfer(source, plan, tmp_path / "out", backend)
    assert not changed.value.certificate.passed
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not transfer(source, plan, tmp_path / "out", backend, allow_lossy=True).certificate.passed
    assert checkpoint.load(tmp_path / "out").config == plan.target_config


@pytest.mark.parametrize("when", ["writing", "certifying"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, when, error):
    def interrupted(*arguments, **options):
        raise error

    source = saved(DENSE, tmp_path / "source")
    if when == "certifying":
        monkeypatch.setattr(transfers, "certify_streamed", interrupted)
    else:
        monkeypatch.setattr("mlx_moe.transfer.plan._take", interrupted)
    with pytest.raises(error):
        transfer(source, PLANS["experts"](DENSE), tmp_path / "out", choose_backend("torch"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(tmp_path, mlxmoe):
    save("llama", tmp_path / "theirs")
    commands = (["upcycle", tmp_path / "theirs"], ["grow", tmp_path / "theirs", "--n-layers", 4])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        for command, *arguments in (*commands, ["import", tmp_path / "theirs"], ["export", tmp_path / "theirs"]):
            result = mlxmoe(command, arguments[0], tmp_path / "out", *arguments[1:])
            assert result.code == 2
            assert "nothing of it was kept" in result.err
            assert "\n" not in result.err.strip()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_shard_cut_short_is_found_before_anything_is_written(tmp_path, mlxmoe):
    save("llama", tmp_path / "theirs", max_shard_size="20KB")
    shard = sorted((tmp_path / "theirs").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    result = mlxmoe("upcycle", tmp_path / "theirs", tmp_path / "out")
    assert result.code == 2
    assert shard.name in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_manifest_states_what_is_there(tmp_path):
    done = saved(DENSE, tmp_path / "source")
    transfer(done, PLANS["experts"](DENSE), tmp_path / "out", choose_backend("torch"))
    manifest = json.loads((tmp_path / "out" / checkpoint.MANIFEST).read_text())
    file = tmp_path / "out" / checkpoint.MODEL
    assert manifest[checkpoint.MODEL] == {"bytes": file.stat().st_size, "sha256": checkpoint.sha256(file)}
    arrays = load_file(file)
    assert {name: array.shape for name, array in arrays.items()} == shapes(PLANS["experts"](DENSE).target_config)


def test_a_mixture_of_theirs_grows(tmp_path):
    save("mixtral", tmp_path / "theirs")
    source = open_model(tmp_path / "theirs")
    plan = plan_growth(source.config, grow_config(source.config, d_model=40, n_layers=3))
    assert transfer(source, plan, tmp_path / "out", choose_backend("torch")).certificate.passed
    tokens = random_tokens()
    before, after = (our_logits("torch", loaded, tokens) for loaded in (source, checkpoint.load(tmp_path / "out")))
    assert np.abs(before - after).max() < 1e-4


def test_a_transfer_takes_no_folder_that_exists(tmp_path):
    source = saved(DENSE, tmp_path / "source")
    with pytest.raises(InputError, match="exists already"):
        transfer(source, PLANS["experts"](DENSE), tmp_path / "source", choose_backend("torch"))
