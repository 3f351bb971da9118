import pytest
import torch
from support.small_models import MIXED, rough_weights, small_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mlx_moe.accounting.flops import flops_per_token, mfu
from mlx_moe.config import ModelConfig, MoEConfig, UpcyclePhaseConfig
from mlx_moe.presets import load_architecture, preset_names
from mlx_moe.transfer.moe_layout import experts_of
from torch_ref.transformer import Transformer


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_as_many_as_pytorch_counts(name, moe, attention):
    config = small_model(name, moe=moe, attention_backend=attention)
    flops = flops_per_token(config)
    forward, backward = counted(initialized(config), 2, config.context_length)
    assert forward == pytest.approx(flops.forward, rel=0.01)
    # A fused kernel keeps no scores and computes them again.
    repeated = flops.attention // 2 if attention == "sdpa" else 0
    assert backward == pytest.approx(flops.training - flops.forward + repeated, rel=0.01)


@pytest.mark.parametrize("moe", [None, MoEConfig()], ids=["dense", "experts"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_presets_at_full_size(name, moe):
    config = load_architecture(name, attention_backend="manual").model_copy(update={"moe": moe})
    # In bfloat16, since PyTorch knows the shapes of grouped products in no other dtype without computing them.
    with torch.device("meta"):
        forward, backward = counted(Transformer(config), 1, config.context_length, torch.bfloat16)
    flops = flops_per_token(config)
    assert forward == pytest.approx(flops.forward, rel=0.01)
    assert backward == pytest.approx(flops.training - flops.forward, rel=0.01)


def test_gpt2_by_hand():
    flops = flops_per_token(load_architecture("gpt2"))
    D, L, T, V = 768, 12, 1024, 50257
    assert flops.forward == 2 * (12 * L * D * D + D * V) + 4 * L * T * D
    assert flops.training == 3 * flops.forward
    assert flops.elementwise < 0.01 * flops.forward


def test_only_chosen_experts_count():
    few, many = (flops_per_token(small_model("llama", moe=MoEConfig(n_experts=n, top_k=2))) for n in (2, 8))
    dense = flops_per_token(small_model("llama"))
    assert few.ffn == many.ffn == 2 * dense.ffn
    assert many.router == 4 * few.router > dense.router == 0


def test_granular_experts_take_as_much_and_a_shared_one_a_copy_more():
    dense = small_model("llama")
    whole, cut, shared = (
        flops_per_token(dense.model_copy(update={"moe": experts_of(dense, UpcyclePhaseConfig(n_experts=4, **how))}))
        for how in ({}, {"granularity": 4}, {"shared": True})
    )
    assert whole.ffn == cut.ffn == 2 * flops_per_token(dense).ffn
    assert shared.ffn == 3 * flops_per_token(dense).ffn
    assert cut.router == 4 * whole.router


def test_mfu_is_a_share_of_the_peak():
    flops = flops_per_token(ModelConfig())
    assert mfu(flops, tokens_per_s=1e12 / flops.training, peak_flops_per_s=4e12) == pytest.approx(0.25)


def counted(model, n_sequences, length, dtype=torch.float32):
    """What PyTorch does for one token, forward and backward."""
    tokens_BT = torch.randint(0, 65, (n_sequences, length))
    aten = torch.ops.aten
    on_cpu = {  # the counter knows those of CUDA
        aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten._grouped_mm: grouped,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as forward:
        logits_BTV, _ = model(tokens_BT, dtype=dtype)
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as backward:
        logits_BTV.sum().backward()
    return forward.get_total_flops() / tokens_BT.numel(), backward.get_total_flops() / tokens_BT.numel()


def initialized(config):
    model = Transformer(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in rough_weights(config, 0).items()})
    return model


def attention_forward(query, key, value, *_, out_shape=None, **__):
    return sdpa_flop_count(query, repeated(key, query), repeated(value, query))


def attention_backward(gradient, query, key, value, *_, out_shape=None, **__):
    return sdpa_backward_flop_count(gradient, query, repeated(key, query), repeated(value, query))


def repeated(shape, query):
    """Keys and values are shared by groups of query heads."""
    return (shape[0], query[1], *shape[2:])


def grouped(one, other, *_, out_shape=None, **__):
    """(A, K) with (E, K, N), each row with one of the E; or (M, A) with (A, N), split into E parts of A."""
    return 2 * one[0] * one[1] * other[-1]
