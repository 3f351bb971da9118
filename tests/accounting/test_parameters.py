import math

import pytest
from support.small_models import MIXED, small_model

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.parameters import counted_table, non_embedding_parameters, parameters_by_part
from mlx_moe.config import LoRAConfig, MoEConfig
from mlx_moe.parameters import initialize, parameter_table
from mlx_moe.phases import phase_model
from mlx_moe.presets import load_architecture, load_run, preset_names


def test_the_three_phases_to_the_digit():
    run = load_run("three-phase")
    dense, moe, large = (count_parameters(phase_model(run, phase)) for phase in (1, 2, 3))
    assert (dense.total, dense.active, dense.idle_experts) == (100_038_016, 100_038_016, 0)
    assert (moe.total, moe.active, moe.inactive, moe.idle_experts) == (371_640_256, 138_878_272, 232_761_984, 42)
    assert moe.to_json()["efficiency_percent"] == 37.4
    assert large.total == 1_436_055_192


def test_twice_the_width_takes_twice_the_heads():
    model = phase_model(load_run(overrides=["phases.large_moe.d_model=1664"]), 3)
    assert (model.d_model, model.n_heads, model.head_dim, model.d_ff) == (1664, 16, 104, 6656)
    assert count_parameters(model).total == sum(math.prod(parameter.shape) for parameter in parameter_table(model))


@pytest.mark.parametrize(
    ("name", "total"), [("gpt2", 124_439_808), ("gpt2-post", 124_439_808), ("smollm", 134_515_008)]
)
def test_published_sizes(name, total):
    count = count_parameters(load_architecture(name))
    assert count.total == count.active == total
    assert count.efficiency == 1


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=5, top_k=2), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_models_have_as_many_elements_as_counted(name, moe):
    from mlx.utils import tree_flatten

    import torch_ref.transformer
    from mlx_moe.model.transformer import Transformer

    config = small_model(name, moe=moe)
    expected = count_parameters(config).total
    assert sum(parameter.numel() for parameter in torch_ref.transformer.Transformer(config).parameters()) == expected
    assert sum(array.size for _, array in tree_flatten(Transformer(config).parameters())) == expected
    assert sum(array.size for array in initialize(config, 0).values()) == expected


def test_active_is_the_model_with_only_the_experts_a_token_visits():
    sparse = count_parameters(small_model("llama", moe=MoEConfig(n_experts=6, top_k=2)))
    visited = count_parameters(small_model("llama", moe=MoEConfig(n_experts=2, top_k=2)))
    other_rows_of_the_routers = 2 * 4 * 48  # layers, experts, width
    assert sparse.active == visited.total + other_rows_of_the_routers
    assert sparse.idle_experts == 2 * 4
    mixed = count_parameters(small_model("llama", moe=MIXED))
    visited = count_parameters(small_model("llama", moe=MIXED.model_copy(update={"n_experts": MIXED.top_k})))
    assert mixed.active == visited.total + 2 * 48
    assert mixed.idle_experts == 2


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=5, top_k=2), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_the_parts_make_the_whole(name, moe):
    config = small_model(name, moe=moe)
    assert sum(parameters_by_part(config).values()) == count_parameters(config).total


def test_parts_of_gpt2_by_hand():
    parts = parameters_by_part(load_architecture("gpt2"))
    D, L = 768, 12
    assert parts == {
        "embeddings": 50257 * D + 1024 * D,
        "attention": L * 4 * (D * D + D),
        "router": 0,
        "ffn": L * (8 * D * D + 5 * D),
        "norms": (2 * L + 1) * 2 * D,
        "head": 0,
    }
    assert non_embedding_parameters(load_architecture("gpt2")) == 124_439_808 - parts["embeddings"]


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3, targets=("q_proj", "down_proj"))], ids=["all", "adapters"])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=5, top_k=2), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_counting_a_layer_of_each_kind_counts_them_all(name, moe, lora):
    config = small_model(name, moe=moe).model_copy(update={"lora": lora})
    counted = sorted(
        (parameter.shape, parameter.is_trained) for parameter, number in counted_table(config) for _ in range(number)
    )
    assert counted == sorted((parameter.shape, parameter.is_trained) for parameter in parameter_table(config))


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=5, top_k=2), MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_the_bound_of_a_model_goes_by_its_matrices(name, moe):
    config = small_model(name, moe=moe)
    assert config.n_matrix_elements == sum(math.prod(p.shape) for p in parameter_table(config) if p.is_matrix)
