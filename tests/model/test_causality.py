"""No logit depends on a later token, or on another row of the batch."""

import numpy as np
import pytest
from support.small_models import BACKENDS, build, every_model, random_tokens

from mlx_moe.config import COMPONENTS

# Other tokens may take an expert's place in a product, and so change the order of a sum.
ROUNDING = 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", COMPONENTS["attention_backend"])
@pytest.mark.parametrize("config", every_model())
def test_logits_depend_on_the_past_only(config, attention, backend):
    config = config.model_copy(update={"attention_backend": attention})
    trainer, tokens = build(backend, config), random_tokens(config)
    logits_BTV = trainer.logits(tokens)
    for t in (0, 11, config.context_length - 1):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % config.vocab_size
        difference_BT = np.abs(trainer.logits(changed) - logits_BTV).max(axis=-1)
        assert difference_BT[1].max() < ROUNDING
        assert difference_BT[0, :t].max(initial=0) < ROUNDING
        assert difference_BT[0, t:].min() > 100 * ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", every_model())
def test_logits_do_not_depend_on_what_is_not_there_yet(config, backend):
    trainer, tokens = build(backend, config), random_tokens(config)
    logits_BTV = trainer.logits(tokens)
    for n_tokens in (1, 13):
        assert np.abs(trainer.logits(tokens[:, :n_tokens]) - logits_BTV[:, :n_tokens]).max() < ROUNDING
