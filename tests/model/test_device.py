"""Devices: who gets which, and MLX's defaults, which are the process's and not a trainer's.

Metal and CUDA are not here: that a model on the CPU leaves a GPU as the default device is seen on the CPU only, by the
contexts that its calls enter.
"""

import importlib
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from support.small_models import BACKENDS, FOUR_EXPERTS, build, larger_model, random_tokens, rough_weights, small_model

import mlx_moe.model
from mlx_moe.config import OptimizerConfig
from mlx_moe.device import CPU, CUDA
from mlx_moe.errors import InputError
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.growth import plan_growth

CONFIG = small_model("smollm", moe=FOUR_EXPERTS)
TOKENS = random_tokens(CONFIG, 2, CONFIG.context_length + 1)
PLAN = plan_growth(CONFIG, larger_model(CONFIG), seed=1)
CALLS = {
    "step": lambda trainer: trainer.step(TOKENS, 1e-3, 0),
    "metrics": lambda trainer: trainer.step(TOKENS, 1e-3, 0)(),
    "loss": lambda trainer: trainer.loss(TOKENS),
    "logits": lambda trainer: trainer.logits(TOKENS[:, :-1]),
    "routed_logits": lambda trainer: trainer.routed_logits(TOKENS[:, :-1]),
    "module_output": lambda trainer: trainer.module_output("norm", np.ones((1, 2, CONFIG.d_model), np.float32)),
    "expert_load": lambda trainer: trainer.expert_load(TOKENS),
    "decoder": lambda trainer: trainer.decoder()(TOKENS[:, :4]),
    "weights": lambda trainer: trainer.weights(),
    "optimizer_state": lambda trainer: trainer.load_optimizer_state(trainer.optimizer_state()),
    "stored": lambda trainer: [dict(arrays) for arrays in trainer.lazy_state()],
    "transferred": lambda trainer: trainer.apply_transfer(PLAN, carry=True),
}


@pytest.fixture
def entered(monkeypatch):
    """The devices of all contexts that were entered; setting a default of the process is an error meanwhile."""
    devices, true = [], mx.stream

    def stream(device):
        devices.append(device)
        return true(device)

    def refuse(device):
        raise AssertionError(f"the process's default became {device}")

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(mx, "set_default_device", refuse)
    monkeypatch.setattr(mx, "set_default_stream", refuse)
    return devices


def defaults():
    return mx.default_device(), mx.default_stream(mx.cpu), torch.get_default_device(), torch.get_default_dtype()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_leaves_the_defaults_of_the_process(backend, entered):
    before = defaults()
    trainer = build(backend, CONFIG)
    assert defaults() == before
    for name, call in CALLS.items():
        entered.clear()
        call(trainer)
        assert defaults() == before, name
        assert (mx.cpu in entered) == (backend == "mlx"), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_streamed_model_and_a_measurement_leave_the_defaults_of_the_process(backend, entered, monkeypatch):
    before = defaults()
    chosen = choose_backend(backend)
    model = chosen.streamed(CONFIG, rough_weights(CONFIG, seed=0), "cpu")
    for logits_TV in model.each_logits(TOKENS[:, :-1]):
        assert logits_TV.shape == (CONFIG.context_length, CONFIG.vocab_size)
        assert defaults() == before
    for read_ND in model.ffn_inputs(TOKENS[:, :-1], {0, 1}):
        assert read_ND.shape == (2 * CONFIG.context_length, CONFIG.d_model)
        assert defaults() == before
    model.routed_logits(TOKENS[:, :-1])
    monkeypatch.setattr(chosen.device, "SECONDS", 0.01)
    chosen.device.measure_flops_per_s("fp32", "cpu")
    assert defaults() == before
    assert bool(entered) == (backend == "mlx")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_is_asked_for_by_name_or_by_itself(backend):
    choose_device = choose_backend(backend).device.choose_device
    assert choose_device("cpu") == choose_device(CPU) == CPU
    assert build(backend, CONFIG).device == CPU
    with pytest.raises(InputError, match=r"--device 'tpu': .* knows auto, cpu"):
        choose_device("tpu")
    if choose_device("auto") == CPU:
        with pytest.raises(InputError, match=r"--device gpu: .* finds neither"):
            choose_device(CUDA)


@pytest.mark.parametrize(("name", "label"), [("auto", "CUDA"), ("gpu", "CUDA"), ("cuda", "CUDA"), ("cpu", "CPU")])
def test_torch_takes_cuda_where_there_is_one(name, label, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = importlib.import_module("torch_ref.device").choose_device(name)
    assert (device.label, device.kind) == (label, "cpu" if label == "CPU" else "gpu")


@pytest.mark.parametrize(("name", "label"), [("auto", "CPU"), ("gpu", "Metal (MPS)"), ("mps", "Metal (MPS)")])
def test_torch_takes_mps_on_request_only(name, label, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert importlib.import_module("torch_ref.device").choose_device(name).label == label


@pytest.mark.parametrize(("name", "label"), [("auto", "Metal"), ("gpu", "Metal"), ("cpu", "CPU")])
def test_mlx_takes_metal_where_there_is_one(name, label, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert importlib.import_module("mlx_moe.model.device").choose_device(name).label == label


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone resolves symbols in one scope")
def test_whose_blas_pytorch_takes_is_in_its_instructions():
    """Resume compares them, since another BLAS sums in another order."""
    ask = "import torch_ref.device; print(torch_ref.device.instructions())"
    capability = torch.backends.cpu.get_cpu_capability()
    taken = f"{capability} with OpenBLAS" if mlx_moe.model.FAST_BLAS.startswith("OpenBLAS") else capability
    for first, expected in (("mlx_moe.model", taken), ("torch", capability)):
        code = f"import {first}; import mlx_moe.model; {ask}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == expected


@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_a_step_that_fails_leaves_the_random_state_of_the_process(seed, monkeypatch):
    trainer = choose_backend("mlx").trainer(CONFIG, rough_weights(CONFIG, 0), OptimizerConfig(), "cpu")
    monkeypatch.setattr(trainer.step, "update", lambda gradients: 1 / 0)
    mx.random.seed(seed)
    expected = np.array(mx.random.normal((3,)))
    mx.random.seed(seed)
    with pytest.raises(ZeroDivisionError):
        trainer.step(TOKENS, 1e-3, 0)
    np.testing.assert_array_equal(np.array(mx.random.normal((3,))), expected)
