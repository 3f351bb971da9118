import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from support.small_models import MIXED, small_model

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.memory import step_memory
from mlx_moe.config import EngineConfig, MoEConfig, OptimizerConfig
from mlx_moe.parameters import initialize, parameter_table
from mlx_moe.presets import load_architecture, preset_names
from mlx_moe.training.backend import choose_backend
from torch_ref.moe import auxiliary_loss, expert_load
from torch_ref.transformer import Transformer

BACKENDS = ("mlx", "torch")
FP32 = EngineConfig(precision="fp32")
N_SEQUENCES = 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4)], ids=["dense", "experts"])
def test_weights_gradients_and_moments_to_the_byte(backend, moe):
    config = small_model("llama", moe=moe)
    memory = of(config, backend)
    assert memory.weights == memory.gradients == 4 * count_parameters(config).total
    assert memory.optimizer == 2 * memory.weights
    muon = of(config, backend, optimizer=OptimizerConfig(name="muon"))
    assert memory.optimizer - muon.optimizer == 4 * sum(
        math.prod(parameter.shape) for parameter in parameter_table(config) if parameter.is_hidden_matrix
    )


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_pytorch_keeps_what_is_counted(name, moe, attention):
    config = small_model(name, moe=moe, attention_backend=attention)
    # The rest is a few numbers a token: means, logarithms of sums, positions.
    assert of(config, "torch").activations == pytest.approx(kept_by_pytorch(config), rel=0.06)


def test_dropout_keeps_its_masks():
    config = small_model("team", dropout=0.1)
    assert of(config, "torch").activations == pytest.approx(kept_by_pytorch(config), rel=0.06)


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4), MIXED], ids=["dense", "experts", "mixed"])
def test_mlx_takes_what_is_counted(moe):
    size = {"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 2048, "context_length": 128}
    config = load_architecture("simple", moe=moe, **size)
    trainer = choose_backend("mlx").trainer(config, initialize(config, 0), OptimizerConfig(), "cpu", engine=FP32)
    others = mx.get_active_memory() - 4 * count_parameters(config).total
    tokens_BT1 = np.random.default_rng(0).integers(0, 2048, (8, 129)).astype(np.int32)
    trainer.step(tokens_BT1, 1e-4, 0)()
    mx.reset_peak_memory()
    trainer.step(tokens_BT1, 1e-4, 0)()
    assert of(config, "mlx", batch_size=8).peak == pytest.approx(mx.get_peak_memory() - others, rel=0.15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_saves_memory(backend, device):
    config = load_architecture("smollm", moe=MoEConfig())
    whole = of(config, backend, device, 16)
    settings = [{"accumulation_steps": 16}, {"activation_checkpointing": True}, {"precision": "bf16"}]
    for setting in settings:
        saving = of(config, backend, device, 16, FP32.model_copy(update=setting))
        rounds = setting == {"precision": "bf16"} and (backend, device) == ("mlx", "cpu")  # and computes in float32
        assert (saving.peak < whole.peak) is not rounds
        assert saving.weights + saving.optimizer == whole.weights + whole.optimizer
    assert of(config, backend, device, 15).peak < whole.peak


def test_gradients_of_earlier_parts_are_held():
    config = small_model("llama")
    parts = of(config, "torch", batch_size=8, engine=FP32.model_copy(update={"accumulation_steps": 4}))
    alone = of(config, "torch", batch_size=2)
    assert parts.moments["loss"] - alone.moments["loss"] == alone.gradients


def of(config, backend, device="cpu", batch_size=N_SEQUENCES, engine=FP32, optimizer=None):
    return step_memory(config, optimizer or OptimizerConfig(), engine, batch_size, backend, device)


def kept_by_pytorch(config):
    """Bytes of all tensors that the forward pass saves, parameters and what the loss itself keeps aside."""
    torch.manual_seed(0)
    model = Transformer(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # so that no two share an address
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT1 = torch.randint(0, config.vocab_size, (N_SEQUENCES, config.context_length + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, routings = model(tokens_BT1[:, :-1])
        for routing in routings:
            auxiliary_loss(routing, expert_load(routing), config.moe)
    return sum(saved.values())
