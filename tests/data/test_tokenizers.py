import json
import shutil
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_moe.data.stories import stories
from mlx_moe.data.tokenizers import Tokenizer, make_tokenizer
from mlx_moe.errors import InputError

TEXT = [*stories(120), "Größe 東京 🙂\n\ttab  two spaces\r\n"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return make_tokenizer("bpe:600", lambda: iter(TEXT))


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return make_tokenizer("char", lambda: iter(TEXT))


@pytest.fixture(scope="module")
def gpt2(shared_data) -> Tokenizer:
    return make_tokenizer(str(shared_data / "gpt2"), pytest.fail)


@given(UNICODE)
def test_bpe_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=30)
@given(UNICODE)
def test_gpt2_round_trip(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@given(st.text(sorted(set("".join(TEXT))), max_size=60))
def test_char_round_trip_and_one_token_per_character(char, text):
    ids = char.encode(text)
    assert len(ids) == len(text)
    assert char.decode(ids) == text


def test_char_vocabulary(char):
    characters = set("".join(TEXT))
    assert char.vocab_size == len(characters) + 2
    (unknown,) = char.encode("ж")
    assert unknown not in {token for text in TEXT for token in char.encode(text)}
    assert char.decode([unknown]) == "<|unknown|>"
    assert char.encode("aжb")[::2] == char.encode("ab")


def test_bpe_vocabulary(bpe):
    assert bpe.vocab_size == 600
    least = make_tokenizer("bpe:257", lambda: iter(TEXT))
    assert least.vocab_size == 257
    assert len(least.encode("東京")) == 6
    assert len(bpe.encode(TEXT[0])) < 0.5 * len(least.encode(TEXT[0]))


def test_bpe_training_is_deterministic(bpe):
    again = make_tokenizer("bpe:600", lambda: iter(TEXT))
    assert again.identity == bpe.identity
    assert make_tokenizer("bpe:600", lambda: iter(TEXT[:50])).identity != bpe.identity


def test_gpt2_is_the_published_one(gpt2):
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]


@pytest.mark.parametrize("name", ["bpe", "char", "gpt2"])
def test_every_kind(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"
    assert tokenizer.encode("") == []
    batch = tokenizer.encode_batch(TEXT)
    assert batch == [tokenizer.encode(text) for text in TEXT]
    assert tokenizer.eot_id not in {token for ids in batch for token in ids}
    assert 0 <= min(map(min, batch)) <= max(map(max, batch)) < tokenizer.vocab_size

    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.identity == tokenizer.identity
    assert (again.vocab_size, again.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    assert again.encode_batch(TEXT[:20]) == batch[:20]
    assert again.decode(batch[-1]) == TEXT[-1]


def test_transformers_reads_what_is_saved(bpe, tmp_path):
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == bpe.eot_id
    assert theirs.encode(TEXT[0], add_special_tokens=False) == bpe.encode(TEXT[0])
    assert theirs.decode(bpe.encode(TEXT[-1])) == TEXT[-1]


def edited(bpe, folder, edit=lambda model: None, config=None):
    bpe.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())
    edit(model)
    (folder / "tokenizer.json").write_text(json.dumps(model))
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_adds_cuts_and_pads_nothing_though_the_file_says_so(bpe, tmp_path):
    def edit(model):
        model["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        model["padding"] = {
            "strategy": {"Fixed": 4096},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }
        model["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }

    loaded = Tokenizer.load(edited(bpe, tmp_path, edit))
    assert loaded.encode(TEXT[0]) == bpe.encode(TEXT[0])
    assert loaded.encode_batch(TEXT[:2]) == bpe.encode_batch(TEXT[:2])


@pytest.mark.parametrize("config", [{"eos_token": "e"}, {"eos_token": {"content": "e", "lstrip": False}}])
def test_end_of_text_from_the_config(bpe, tmp_path, config):
    loaded = Tokenizer.load(edited(bpe, tmp_path, config=config))
    assert [loaded.eot_id] == bpe.encode("e")
    assert loaded.identity != bpe.identity


def test_end_of_text_from_the_special_tokens_map(bpe, tmp_path):
    folder = edited(bpe, tmp_path, config={"eos_token": None})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "e"}')
    assert [Tokenizer.load(folder).eot_id] == bpe.encode("e")


def test_vocabulary_with_gaps_counts_to_the_largest_id(bpe, tmp_path):
    def edit(model):
        model["model"]["vocab"]["far"] = 5000

    assert Tokenizer.load(edited(bpe, tmp_path, edit)).vocab_size == 5001


def refusal(spec):
    with pytest.raises(InputError) as caught:
        make_tokenizer(str(spec), lambda: iter(TEXT))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:big", "bpe:256", "bpe:-5", "bpe:1e3", "bpe:99999999999", "bpe:²"])
def test_bad_vocabulary(spec):
    message = refusal(spec)
    assert repr(spec) in message
    assert "257" in message


def test_bad_folders(bpe, tmp_path):
    assert "no tokenizer.json" in refusal(tmp_path)
    bpe.save(tmp_path)
    assert "is a file" in refusal(tmp_path / "tokenizer.json")
    assert "no tokenizer folder" in refusal(tmp_path / "missing")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    assert "'<|nowhere|>' is not in the vocabulary" in refusal(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "must be a mapping" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot read" in refusal(tmp_path)


def test_folder_that_names_no_end_of_text(char, tmp_path):
    char.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<|start|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "add eos_token" in refusal(tmp_path)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    import huggingface_hub

    def out_of_reach(self, name, timeout):
        assert timeout <= 10
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", out_of_reach)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("spec", ["gpt2", "roneneldan/TinyStories-1M"])
def test_hub_out_of_reach(no_network, spec):
    message = refusal(spec)
    assert repr(spec) in message
    assert "did you mean" not in message
    assert all(way in message for way in ("bpe:2048", "char", "local folder", "service not known"))


@pytest.mark.parametrize(("spec", "meant"), [("bpe2048", "bpe:2048"), ("chars", "char"), ("gpt-2", "gpt2")])
def test_misspelt_name(no_network, spec, meant):
    assert f"did you mean {meant!r}?" in refusal(spec)


def test_tokenizer_once_downloaded_needs_no_network(bpe, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--words" / "snapshots" / ("0" * 40)
    bpe.save(snapshot)
    (tmp_path / "models--someone--words" / "refs").mkdir()
    (tmp_path / "models--someone--words" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert make_tokenizer("someone/words", pytest.fail).identity == bpe.identity
    shutil.rmtree(tmp_path)


def test_ids_of_numpy_arrays_decode(bpe):
    ids = np.array(bpe.encode(string.printable), dtype=np.uint16)
    assert bpe.decode(ids.tolist()) == string.printable
