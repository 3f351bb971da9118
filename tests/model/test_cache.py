"""Decoding with a key-value cache against the whole sequence at once."""

import numpy as np
import pytest
from support.small_models import (
    BACKENDS,
    FOUR_EXPERTS,
    LIMIT_LOGITS,
    build,
    largest_difference,
    random_tokens,
    small_model,
)

from mlx_moe.config import COMPONENTS

CHUNKS = {
    "one by one": [1] * 32,
    "prefill, then one by one": [16] + [1] * 16,
    "chunks": [5, 1, 9, 2, 15],
    "at once": [32],
}


def cached_models():
    return [
        pytest.param(small_model(name, moe=moe, attention_backend=attention, **fields), id=f"{label}-{attention}")
        for name, fields in (
            ("gpt2", {}),
            ("smollm", {}),
            ("simple", {"position_encoding": "none"}),
            ("llama", {"qk_norm": True, "rope_scaling": {"factor": 8.0, "original_context_length": 16}}),
        )
        for moe in (None, FOUR_EXPERTS)
        for attention in COMPONENTS["attention_backend"]
        for label in [f"{fields.get('position_encoding', name)}-{'experts' if moe else 'dense'}"]
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", cached_models())
def test_decoding_equals_the_whole_sequence(config, backend):
    trainer, tokens = build(backend, config), random_tokens(config, n_rows=3)
    logits_BTV = trainer.logits(tokens)
    for name, sizes in CHUNKS.items():
        decoder, end = trainer.decoder(), 0
        assert sum(sizes) == config.context_length
        for size in sizes:
            logits_BV = decoder(tokens[:, end : end + size])
            end += size
            assert decoder.length == end
            assert largest_difference(logits_BV, logits_BTV[:, end - 1]) < LIMIT_LOGITS, (name, end)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoders_do_not_share_a_cache(backend):
    config = small_model("llama")
    trainer, tokens = build(backend, config), random_tokens(config)
    one, other = trainer.decoder(), trainer.decoder()
    one(tokens[:1, :9])
    assert other.length == 0
    assert largest_difference(other(tokens[1:]), trainer.logits(tokens[1:])[:, -1]) < LIMIT_LOGITS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_grows_by_blocks_up_to_the_context(backend):
    config = small_model("llama", context_length=600)
    trainer, tokens = build(backend, config), random_tokens(config)
    logits_BTV, decoder, end = trainer.logits(tokens), trainer.decoder(), 0
    for size in (255, 1, 1, 254, 1, 1, 86, 1):  # a block has 256 tokens, the last one 88
        logits_BV = decoder(tokens[:, end : end + size])
        end += size
        assert decoder.length == end
        assert largest_difference(logits_BV, logits_BTV[:, end - 1]) < LIMIT_LOGITS, end
    assert end == config.context_length


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_written_in_place(backend):
    """The past is neither copied nor moved: its buffer stays where it is in memory."""
    config = small_model("llama", context_length=300)
    tokens, decoder = random_tokens(config), build(backend, config).decoder()
    decoder(tokens[:, :100])

    def addresses():
        buffers = [buffer for layer in decoder._cache for buffer in (layer._keys, layer._values)]
        return [np.asarray(buffer).ctypes.data for buffer in buffers]

    before = addresses()
    for i in range(100, 110):
        decoder(tokens[:, i : i + 1])
        assert addresses() == before
