"""A real model all the way: SmolLM2-135M to 8 experts, out as Mixtral, opened by other tools."""

import os
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from support.published_models import our_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

import parity.libraries.mlx_lm
import parity.libraries.transformers
from mlx_moe.hub.models import open_model, probe_tokens

SMOLLM2 = Path(os.environ.get("SMOLLM2", "smollm2"))
PROMPT, NEW_TOKENS = "Once upon a time", 20
pytestmark = pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M is not here; SMOLLM2 names its folder")


@pytest.fixture(scope="module")
def exported(mlxmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    assert mlxmoe("upcycle", SMOLLM2, folder / "experts", "--experts", 8, "--top-k", 2).code == 0
    assert mlxmoe("export", folder / "experts", folder / "mixtral", "--format", "mixtral").code == 0
    return folder / "mixtral"


def test_its_logits_are_those_of_transformers():
    loaded = open_model(SMOLLM2)
    tokens = probe_tokens(loaded, 2)[:, :-1]
    theirs = parity.libraries.transformers.logits(loaded.path, tokens)
    assert np.abs(our_logits("torch", loaded, tokens) - theirs).max() < 1e-4  # of logits up to 40


def test_other_tools_give_the_dense_model_s_logits(exported):
    """The exact ones: two float32 computations of the same model, the same tool's too, differ by 1e-4."""
    tokens_BT = probe_tokens(open_model(SMOLLM2), 4)[:, :-1]
    exact = parity.libraries.transformers.LibraryModel(SMOLLM2, exact=True).logits(tokens_BT)
    for library in (parity.libraries.transformers, parity.libraries.mlx_lm):
        assert np.abs(library.logits(exported, tokens_BT) - exact).max() < 1e-4, library.__name__


def test_they_write_the_same_sentence(exported):
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    prompt = tokenizer(PROMPT, return_tensors="pt")

    def by_transformers(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        (tokens,) = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        return tokenizer.decode(tokens)

    dense = by_transformers(SMOLLM2)
    assert len(dense) > len(PROMPT) + NEW_TOKENS
    assert by_transformers(exported) == dense
    model, its_tokenizer = mlx_lm.load(str(exported))
    assert PROMPT + mlx_lm.generate(model, its_tokenizer, PROMPT, max_tokens=NEW_TOKENS) == dense
