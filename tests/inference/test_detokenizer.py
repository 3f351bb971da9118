"""Text piece by piece against the whole decoded at once."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mlx_moe.data.tokenizers import Tokenizer, make_tokenizer
from mlx_moe.inference.detokenizer import MAX_HELD_TOKENS, IncrementalDetokenizer

TEXTS = ["Once upon a time, déjà vu: 東京 🙂👩‍👩‍👧 ﷺ", " two  spaces\n\n\tand tabs don't matter.", "naïve — «quoted»"]


def from_parts(model, decoder):
    from tokenizers import Tokenizer as HFTokenizer

    inner = HFTokenizer(model)
    inner.decoder = decoder
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner, "<|endoftext|>", "a test")


def sentencepiece():
    """As Llama 2's: words begin with ▁, the text's first space is dropped, other characters are bytes."""
    from tokenizers import decoders, models

    words = ["<unk>", "▁", "▁a", "b", "▁the", "é", "s", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return from_parts(model, decoders.Sequence(steps))


def wordpiece():
    """As BERT's: pieces of a word begin with ##, and spaces before stops are taken out."""
    from tokenizers import decoders, models

    words = ["[UNK]", "un", "##aff", "##able", ".", ",", "do", "n't", "the", "東", "##京"]
    return from_parts(models.WordPiece({word: i for i, word in enumerate(words)}), decoders.WordPiece("##", True))


def without_decoder():
    """Tokens joined by spaces, which is what the library does without a decoder; and holes between the ids."""
    from tokenizers import models

    return from_parts(models.WordLevel({"a": 0, "b": 3, "東": 9}, unk_token="a"), None)


TOKENIZERS = {
    "char": lambda: make_tokenizer("char", lambda: iter(TEXTS)),
    "bpe": lambda: make_tokenizer("bpe:300", lambda: iter(TEXTS)),
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
    "no decoder": without_decoder,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def pieces(tokenizer, ids, prompt=()):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_of_random_tokens(tokenizer, data):
    texts = st.lists(st.sampled_from([*TEXTS, "東", "🙂", " a", "é"]), max_size=3).map("".join)
    valid = data.draw(texts.map(tokenizer.encode)) if tokenizer.unknown_id is None else []
    ids = valid + data.draw(st.lists(st.sampled_from(sorted(tokenizer.ids)), max_size=30))
    whole = tokenizer.decode(ids)
    if "�" not in whole:
        assert "".join(pieces(tokenizer, ids)) == whole
        n_prompt = data.draw(st.integers(0, len(ids)))
        prompt_text = tokenizer.decode(ids[:n_prompt])
        if whole.startswith(prompt_text) and "�" not in prompt_text:
            assert prompt_text + "".join(pieces(tokenizer, ids[n_prompt:], ids[:n_prompt])) == whole


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("text", [*TEXTS, "🙂" * 40, "東京" * 40])
def test_a_character_appears_whole_with_its_last_token(name, text):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text) if name == "bpe" else [8 + byte for byte in text.encode()]  # <0x00> is token 8
    assert tokenizer.decode(ids) == text.removeprefix(" " if name == "sentencepiece" else "")
    shown = ""
    for i, piece in enumerate(pieces(tokenizer, ids)[:-1]):
        shown += piece
        whole = tokenizer.decode(ids[: i + 1])
        assert shown == (whole if "�" not in whole else shown)
        assert "�" not in piece
    assert shown == tokenizer.decode(ids)


def test_bytes_that_are_no_text_are_returned_after_some_tokens():
    tokenizer = TOKENIZERS["bpe"]()
    (byte,) = {tokenizer.encode("é")[0], tokenizer.encode("东")[0]} - {tokenizer.encode("é")[0]}
    written = pieces(tokenizer, [byte] * 3 * MAX_HELD_TOKENS)
    assert "".join(written) == tokenizer.decode([byte] * 3 * MAX_HELD_TOKENS)
    assert sum(map(bool, written)) >= 3


def test_the_cost_of_a_token_does_not_grow(monkeypatch):
    tokenizer = TOKENIZERS["bpe"]()
    lengths = []
    decode = Tokenizer.decode

    def counted(self, ids):
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    pieces(tokenizer, tokenizer.encode(TEXTS[0] * 50))
    assert max(lengths) <= 2 * MAX_HELD_TOKENS
