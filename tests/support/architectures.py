"""Small models of every kind, with weights far from their initial values."""

import numpy as np
from hypothesis import strategies as st

from mlx_moe.config import COMPONENTS, MoEConfig, UpcyclePhaseConfig
from mlx_moe.parameters import parameter_table
from mlx_moe.presets import load_architecture
from mlx_moe.transfer.growth import grow_config
from parity.numpy_model import NumpyModel

HEAD_DIM = 4


@st.composite
def architectures(draw, norm_positions=("pre", "post")):
    n_kv_heads = draw(st.integers(1, 3))
    return small(
        d_model=draw(st.integers(3, 9)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=n_kv_heads,
        d_ff=draw(st.integers(1, 9)),
        normalization=draw(st.sampled_from(COMPONENTS["normalization"])),
        norm_position=draw(st.sampled_from(norm_positions)),
        activation=draw(st.sampled_from(COMPONENTS["activation"])),
        ffn_type=draw(st.sampled_from(COMPONENTS["ffn_type"])),
        position_encoding=draw(st.sampled_from(COMPONENTS["position_encoding"])),
        bias=draw(st.booleans()),
        attention_bias=draw(st.sampled_from(["none", "qkv", "qkvo"])),
        qk_norm=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        weight_tying=draw(st.booleans()),
    )


@st.composite
def experts(draw):
    n_experts = draw(st.integers(1, 4))
    return MoEConfig(n_experts=n_experts, top_k=draw(st.integers(1, n_experts)))


@st.composite
def mixtures(draw, config):
    """Draw experts for `config`, some of which are no upcycling of it."""
    layers = sorted(draw(st.sets(st.integers(0, config.n_layers - 1), min_size=1)))
    widths = {"d_ff": draw(st.none() | st.integers(1, 9)), "shared_d_ff": draw(st.integers(0, 5))}
    return draw(experts()).model_copy(update={"layers": tuple(layers), **widths})


@st.composite
def upcyclings(draw, config):
    """Draw phases that upcycle `config`: in some layers, into parts of copies, beside a shared expert."""
    n_experts = draw(st.integers(1, 4))
    return UpcyclePhaseConfig(
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        every=draw(st.integers(1, config.n_layers)),
        granularity=draw(st.sampled_from([n for n in range(1, config.d_ff + 1) if config.d_ff % n == 0])),
        shared=draw(st.booleans()),
        router_init=draw(st.sampled_from(["random", "zero"])),
        router_std=1.0,
    )


def small(**overrides):
    sizes = {"vocab_size": 11, "context_length": 8, "d_model": 6, "n_layers": 2, "n_heads": 2, "d_ff": 5}
    return load_architecture("simple", **({**sizes, "head_dim": HEAD_DIM} | overrides))


def weights(config, dtype=np.float64, seed=0):
    """Return weights without zeros or ones, even in norms; the residual stream has a mean."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for parameter in parameter_table(config):
        fan_in = 1 if len(parameter.shape) == 1 else parameter.shape[-1]
        offset = 1.0 if parameter.start == "ones" else 0.1
        arrays[parameter.name] = generator.normal(offset, 0.5, parameter.shape).astype(dtype) / np.sqrt(
            fan_in, dtype=dtype
        )
    return arrays


def tokens(config, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, 6)


def logits(config, arrays, tokens_T):
    """Return logits (T, V), in the dtype of the arrays."""
    dtype = arrays["norm.weight"].dtype.type
    return NumpyModel(config, arrays, dtype)(tokens_T[None]).logits_BTV[0]


def logit_difference(config, arrays, target, grown, seed=0):
    before = logits(config, arrays, tokens(config, seed))
    after = logits(target, grown, tokens(config, seed))
    assert before.dtype == after.dtype == arrays["norm.weight"].dtype
    assert np.ptp(before) > 1e-3
    return np.abs(before - after).max()


@st.composite
def growths(draw, config):
    """A target for `config`: integer and fractional widths, deeper where that is exact."""
    if config.norm_position == "post" and config.normalization != "rmsnorm":
        d_model = config.d_model * draw(st.integers(1, 3))
    else:
        d_model = config.d_model + draw(st.integers(0, 2 * config.d_model))
    free = {}
    if draw(st.booleans()):
        free["n_kv_heads"] = config.n_kv_heads + draw(st.integers(0, 4))
    if draw(st.booleans()):
        free["d_ff"] = config.d_ff + draw(st.integers(0, 3 * config.d_ff))
    more_layers = 0 if config.norm_position == "post" else draw(st.integers(0, 3))
    return grow_config(config, d_model=d_model, n_layers=config.n_layers + more_layers, **free)
