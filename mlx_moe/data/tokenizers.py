"""Tokenizers in Hugging Face's JSON format: by characters, trained here, or existing ones."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_moe.data.panics import panics_reported
from mlx_moe.data.sources import END_OF_TEXT
from mlx_moe.errors import InputError, one_line, quoted
from mlx_moe.extras import require
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.reading import own_file, read_mapping, read_text
from mlx_moe.storage.tokenizer_files import LARGEST_FILE
from mlx_moe.validation import nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

UNKNOWN = "<|unknown|>"
MIN_BPE_VOCAB, MAX_BPE_VOCAB = 257, 1_000_000  # 256 bytes and the end of text; larger ones run out of memory
CHARACTERS_PER_PIECE = 250_000  # per piece passed to a tokenizer
MOST_TOKENS, LONGEST_TOKEN = 1 << 22, 10_000  # tokens; characters per token
MOST_GROWTH = 64  # factor by which a normalizer or decoder may lengthen a text; Unicode's own forms reach 18
TRIAL = "The 2 quick (brown) foxes' déjà vu: 東京 🙂 ﷺ\n\t__x = {1.5}\r\n"
HUB_NAME = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
TOKENIZER_REMEDY = "take bpe:2048, char, or a local folder that holds tokenizer.json"

# Unset, the library prints a warning when a process that has encoded a batch forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer:
    """Conversion between text and ids. `eot_id` ends every document; `vocab_size` is the largest id + 1.

    `ids` are those that have a token; there may be holes between them. `unknown_id` stands for what has no token;
    None where the tokenizer has tokens for any text.
    """

    def __init__(self, inner: HFTokenizer, end_of_text: str, origin: str) -> None:
        """Wrap a tokenizer; `origin` describes its source in error messages."""
        if getattr(inner.model, "dropout", None):  # random omission of merges, which makes ids irreproducible
            inner.model.dropout = None
        self._inner = inner
        self._end_of_text = end_of_text
        self._origin = origin
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.ids: frozenset[int] = frozenset(vocabulary.values())
        self.vocab_size: int = max(self.ids) + 1
        self.eot_id: int = vocabulary[end_of_text]
        self.unknown_id: int | None = vocabulary.get(getattr(inner.model, "unk_token", None) or "")

    @property
    def identity(self) -> str:
        """SHA-256 of the JSON and the end of text."""
        return hashlib.sha256(f"{self._end_of_text}\n{self._inner.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens. Raises InputError if the tokenizer cannot encode it."""
        with self._reported("encode a text"):
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise InputError(f"{self._origin} gives token {max(ids)}, which is not in its vocabulary; save it anew")
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode every text, on all cores; the ids are not checked."""
        with self._reported("encode a text"):
            return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, including special tokens."""
        with self._reported("decode tokens"):
            text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write the files that `load` and transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        # The library's own writer reports a full disk without a reason.
        (folder / "tokenizer.json").write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Return the tokenizer of a folder with tokenizer.json.

        Raises InputError if it is missing or unreadable, or if it is a run's and not the one that the run began with.
        """
        from tokenizers import Tokenizer as HFTokenizer

        path = own_file(folder, "tokenizer.json")
        if path is None:
            raise InputError(f"no tokenizer.json in {folder}; save one there, or take bpe:2048 or char")
        text = read_text(path, LARGEST_FILE)
        with panics_reported(f"read {path}", "save it anew"):
            inner = HFTokenizer.from_str(text)
            # published tokenizers may truncate or pad to any length; both would change the data
            inner.no_truncation()
            inner.no_padding()
            _check_vocabulary(inner, path)
            _check_growth(inner, path)
            with contextlib.suppress(Exception):  # a tokenizer need not be able to encode this text
                inner.encode(TRIAL)
        tokenizer = Tokenizer(inner, _find_end_of_text(folder, inner), str(path))
        _check_run(folder, tokenizer)
        return tokenizer

    def _reported(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return panics_reported(f"{doing} with {self._origin}", "take another tokenizer")


def make_tokenizer(spec: str, documents: Callable[[], Iterator[str]]) -> Tokenizer:
    """Return the tokenizer that a config names: `char`, `bpe:VOCAB`, or a Hugging Face tokenizer by folder or hub name.

    `documents()` is read once for `char` and `bpe`, else not at all. Raises InputError naming the alternatives.
    """
    if spec == "char":
        return _of_characters(documents())
    if spec == "bpe" or spec.startswith("bpe:"):
        return _train_bpe(bpe_vocabulary(spec), documents())
    folder = absolute(Path(spec)) if spec.startswith("~") or "\0" in spec else Path(spec)
    return Tokenizer.load(folder if os.path.isdir(folder) else _from_hub(spec))


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int, noun: str) -> None:
    """Raise InputError where a tokenizer, the `noun` of the message, has more tokens than a model's vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{noun} has {tokenizer.vocab_size} tokens, the model only {vocab_size}; take the tokenizer that it was "
            "trained with"
        )


def cut(text: str) -> Iterator[str]:
    """Yield a text in pieces that end at line breaks: encoding a whole book takes a hundred times its size."""
    start = 0
    while len(text) - start > CHARACTERS_PER_PIECE:
        line_end = text.find("\n", start + CHARACTERS_PER_PIECE)
        if line_end < 0:
            break
        yield text[start : line_end + 1]
        start = line_end + 1
    yield text[start:]


def _of_characters(documents: Iterator[str]) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    characters: set[str] = set()
    for text in documents:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, UNKNOWN, *sorted(characters)])}
    inner = HFTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return Tokenizer(inner, END_OF_TEXT, "tokenizer char")


def _train_bpe(vocab_size: int, documents: Iterator[str]) -> Tokenizer:
    """Train byte-level BPE (Radford et al. 2019); smaller than `vocab_size` if the text has too few pairs to merge."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in documents for piece in cut(text)), trainer)
    return Tokenizer(inner, END_OF_TEXT, f"tokenizer bpe:{vocab_size}")


def bpe_vocabulary(spec: str) -> int:
    """Return the size in `bpe:VOCAB`. Raises InputError if it is not a number, or out of range."""
    number = spec.partition(":")[2]
    if not re.fullmatch(r"[0-9]{1,9}", number) or not MIN_BPE_VOCAB <= int(number) <= MAX_BPE_VOCAB:
        raise InputError(
            f"tokenizer {quoted(spec)}: the vocabulary must be a number from {MIN_BPE_VOCAB} (256 bytes and "
            f"{END_OF_TEXT}) to {MAX_BPE_VOCAB}; take e.g. bpe:2048"
        )
    return int(number)


def _from_hub(name: str) -> Path:
    if os.path.exists(os.path.expanduser(name)):
        raise InputError(f"tokenizer {name!r} is a file; name the folder that holds tokenizer.json")
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"no tokenizer folder {quoted(name)}; {TOKENIZER_REMEDY}")
    require("huggingface_hub", f"tokenizer {name!r}, a name on the Hugging Face hub,")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
            if (folder / "tokenizer.json").is_file():
                return folder
        # Ask briefly first: without a network, a download retries for half a minute and prints every attempt.
        HfApi().model_info(name, timeout=10)
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the remedies are the same for every failure on the way to the hub
        known = ("char", "bpe:2048", "gpt2")
        hint = "" if name in known else nearest(name.lower(), known, cutoff=0.7)
        raise InputError(
            f"cannot get tokenizer {name!r} from the Hugging Face hub ({one_line(error)}); {hint}{TOKENIZER_REMEDY}"
        ) from None


def _check_run(folder: Path, tokenizer: Tokenizer) -> None:
    from mlx_moe.storage.records import Provenance, read_record  # takes 10 ms, and most commands need no record

    record = folder.parent / "data.json"
    if not ((folder.parent / "config.yaml").is_file() and record.is_file()):
        return
    try:
        begun_with = read_record(Provenance, record).tokenizer.identity
    except InputError:  # an unreadable record does not contradict the tokenizer
        return
    if begun_with != tokenizer.identity:
        raise InputError(f"{folder} is not the tokenizer that its run was trained with ({record}); restore that one")


def _find_end_of_text(folder: Path, inner: HFTokenizer) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := own_file(folder, name)) is None:
            continue
        token = read_mapping(file).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"{file}: eos_token {quoted(text)} is no string; write the token that ends a text")
        if inner.token_to_id(text) is None:
            raise InputError(f"{file}: eos_token {quoted(text)} is not in the vocabulary of tokenizer.json; correct it")
        return text
    if inner.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{folder} names no end of text; add eos_token to its tokenizer_config.json")
    return END_OF_TEXT


def _check_vocabulary(inner: HFTokenizer, path: Path) -> None:
    vocabulary = inner.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise InputError(f"{path} has no token; save it anew")
    if (largest := max(vocabulary.values())) >= MOST_TOKENS:
        raise InputError(f"{path} has token {largest:,}, and at most {MOST_TOKENS:,} are read; save it anew")
    if (longest := max(map(len, vocabulary))) > LONGEST_TOKEN:
        raise InputError(f"{path} has a token of {longest:,} characters; at most {LONGEST_TOKEN:,} are read")


def _check_growth(inner: HFTokenizer, path: Path) -> None:
    """Raise InputError if a tokenizer's steps could lengthen a text enough to exhaust memory."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(inner, name)
        if step is not None and (growth := _growth(json.loads(step.__getstate__()))) > MOST_GROWTH:
            times = f"{growth:,.0f}" if growth < 1e9 else "10⁹"
            raise InputError(f"{path}: its {name} can make a text {times} times as long; at most {MOST_GROWTH} is read")


def _growth(step: dict[str, Any]) -> float:
    """Return the maximum factor by which a step lengthens a text; steps bounded by Unicode's forms count as 1."""
    kind = step.get("type")
    if kind == "Sequence":
        parts = next((value for value in step.values() if isinstance(value, list)), [])
        return math.prod(max(1.0, _growth(part)) for part in parts)
    if kind == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        # a regular expression may match the empty string everywhere
        return content / len(pattern["String"]) if pattern.get("String") else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "ByteLevel":
        return 4.0  # one character per byte
    if kind == "Precompiled":
        return _longest_replacement(step["precompiled_charsmap"] or "")
    return 1.0


def _longest_replacement(charsmap: str) -> float:
    """Return the longest replacement's length in a table: 4 bytes of trie size, the trie, zero-terminated texts."""
    table = base64.b64decode(charsmap)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(map(len, texts.split(b"\0"))))
