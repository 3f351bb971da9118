"""What the same-token controls rest on."""

import numpy as np
import pytest
from support.small_experiments import SIZE

from mlx_moe.config import ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.parameters import initialize
from mlx_moe.storage import jsonl
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.upcycling import plan_upcycling

ONE = MoEConfig(n_experts=1, top_k=1, load_balance_coefficient=0, z_loss_coefficient=0)


def test_a_mixture_of_one_expert_trains_like_the_dense_model():
    config = ModelConfig(vocab_size=64, context_length=16, d_model=32, n_layers=2, n_heads=2)
    dense = choose_backend("torch").trainer(config, initialize(config, 0), OptimizerConfig(), "cpu")
    tokens = np.random.default_rng(0).integers(0, 64, (8, 4, 17)).astype(np.int32)
    for step in range(2):
        dense.step(tokens[step], 1e-2, 0)()
    one = dense.apply_transfer(plan_upcycling(config, ONE), carry=True)
    for step in range(2, 8):
        losses = [trainer.step(tokens[step], 1e-2, 0)().loss for trainer in (dense, one)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    before, after = dense.weights(), one.weights()
    for name, array in before.items():
        expert = after.get(name, after.get(name.replace("mlp.", "mlp.experts.")))
        np.testing.assert_allclose(expert.reshape(array.shape), array, atol=1e-5, err_msg=name)


def test_experts_from_scratch_are_trained_in_one_phase(mlxmoe, tmp_path):
    scratch = ("-o", "model.moe.n_experts=4", "-o", "model.moe.top_k=2")
    command = (
        "train",
        "--preset",
        "demo",
        "--tokenizer",
        "bpe:300",
        *SIZE,
        *scratch,
        "--steps",
        4,
        "--backend",
        "torch",
    )
    result = mlxmoe(*command, "--phases", 1, "--out", tmp_path / "a")
    assert result.code == 0, result.err
    assert "Phase 1: mixture of experts from scratch" in result.out
    assert "expert_load" in jsonl.read(tmp_path / "a" / "metrics.jsonl")[1]

    refused = mlxmoe(*command, "--phases", 2, "--out", tmp_path / "b")
    assert refused.code == 2
    assert "the model starts with 4 experts, so there is nothing to upcycle; train it with --phases 1" in refused.err
    assert not (tmp_path / "b").exists()


def test_the_start_says_what_runs(mlxmoe, tmp_path):
    result = mlxmoe(
        "train",
        "--preset",
        "demo",
        "--tokenizer",
        "bpe:300",
        *SIZE,
        "--steps",
        2,
        "--phases",
        1,
        "--out",
        tmp_path / "a",
    )
    for text in (
        "2L-2H-32D-RoPE-LN-GELU-PreNorm",
        "FLOPs per token",
        "ffn",
        "cores",
        "TFLOP/s at best",
        "AdamW (betas 0.9",
    ):
        assert text in result.out
