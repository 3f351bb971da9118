"""What only a CUDA GPU can show."""

import numpy as np
import pytest
import torch
from support.small_models import random_tokens, small_model

from mlx_moe.config import EngineConfig, MoEConfig, OptimizerConfig
from mlx_moe.parameters import initialize
from torch_ref.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4, top_k=2)], ids=["dense", "experts"])
def test_a_step_does_not_wait_for_the_gpu(moe):
    """Until its metrics are fetched: so the host prepares the next one meanwhile."""
    config = small_model("llama", moe=moe)
    trainer = Trainer(config, initialize(config, 0), OptimizerConfig(), "cuda", EngineConfig(precision="bf16"))
    tokens_BT1 = random_tokens(config, 4, config.context_length + 1)
    trainer.step(tokens_BT1, 1e-3, 0)()  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetch = trainer.step(tokens_BT1, 1e-3, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(fetch().loss)
