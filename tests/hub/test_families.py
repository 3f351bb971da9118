"""Every family in, upcycled or grown, and out: the files give transformers' logits of the model that came in."""

import numpy as np
import pytest
from support.published_models import LIMIT, edit_config, logits, random_tokens, save

import parity.libraries.mlx_lm
import parity.libraries.transformers
from mlx_moe.config import MoEConfig, RopeScaling
from mlx_moe.errors import InputError
from mlx_moe.hub.export import export
from mlx_moe.hub.models import open_model, read_model
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_upcycling

LIBRARIES = (parity.libraries.transformers, parity.libraries.mlx_lm)
TOKENS = random_tokens()
# Family -> the formats of it, of its upcycling, of its growth and of the grown upcycling.
OUT = {
    "llama": ("llama", "mixtral"),
    "llama-tied": ("llama", "mixtral"),
    "llama-biased-attention": ("llama", "granitemoe"),
    "llama-linear": ("llama", "granitemoe"),
    "llama3": ("llama", "granitemoe"),
    "mistral": ("llama", "mixtral"),
    "qwen2": ("qwen2", "granitemoe"),
    "qwen3": ("qwen3", "qwen3_moe"),
    "mixtral": (None, "mixtral"),
    "qwen3_moe": (None, "qwen3_moe"),
    "granitemoe": (None, "granitemoe"),
    "gpt2": ("gpt2", None),
}


@pytest.mark.parametrize("name", OUT)
def test_in_upcycled_grown_and_out(name, tmp_path):
    theirs = logits(save(name, tmp_path / "theirs"), TOKENS)
    source = open_model(tmp_path / "theirs")
    dense, experts = OUT[name]
    if source.config.moe:
        upcycled = source
    else:
        upcycled = transferred(source, plan_upcycling(source.config, MoEConfig(n_experts=4, top_k=2)))
    for form, model in ((dense, source), (experts, upcycled)):
        if form:
            assert_out(model, tmp_path / form, form, theirs)
            assert_out(grown(model), tmp_path / f"{form}-grown", form, theirs)


@pytest.mark.parametrize(("name", "said"), [("llama-biased", "biases"), ("llama-heads", "head_dim 16 .mlx-lm")])
def test_experts_that_no_format_holds(name, said, tmp_path):
    save(name, tmp_path / "theirs")
    source = open_model(tmp_path / "theirs")
    upcycled = transferred(source, plan_upcycling(source.config, MoEConfig(n_experts=4, top_k=2)))
    with pytest.raises(InputError, match=said):
        export(upcycled, tmp_path / "out", "auto")


def test_a_window_that_hides_nothing(tmp_path):
    save("qwen2", tmp_path / "theirs")
    for changes in (
        {"use_sliding_window": False, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["sliding_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": ...},
    ):
        edit_config(tmp_path / "theirs", **changes)
        assert read_model(tmp_path / "theirs")[0].context_length == 32


def test_every_spelling_of_scaled_rope(tmp_path):
    save("llama", tmp_path / "theirs")
    linear = {"type": "linear", "factor": 2}
    for changes in (
        {"rope_parameters": ..., "rope_theta": 7e4, "rope_scaling": linear},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}, "rope_scaling": linear},
    ):
        edit_config(tmp_path / "theirs", **changes)
        config = read_model(tmp_path / "theirs")[0]
        assert (config.rope_theta, config.rope_scaling) == (7e4, RopeScaling(factor=2))


def transferred(source, plan):
    return Checkpoint(source.path, plan.target_config, TrainerState(3, 0, "torch"), apply_numpy(plan, source.weights))


def grown(source):
    target = grow_config(source.config, d_model=48, n_layers=3)
    return transferred(source, plan_growth(source.config, target))


def assert_out(source, out, form, expected):
    assert export(source, out, "auto") == form
    for library in LIBRARIES:
        assert np.abs(library.logits(out, TOKENS) - expected).max() < LIMIT, library.NAME
