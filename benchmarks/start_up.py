"""Start-up times: commands, loading of backends, tokenisation, opening of a token cache.

    python benchmarks/start_up.py [--text FILE] [--tokenizer FOLDER] [--rounds 5] [--cache-gb 1]

Commands run in their own processes, interleaved. With a text of one document per line and a Hugging Face tokenizer,
compares our tokenisation with transformers' own call. With `--cache-gb`, opens a token cache of that size for the first
time, which hashes it, and again. Prints milliseconds and ratios, then JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from interleaved import medians, show

COMMANDS = {
    "python": ["-c", "pass"],
    "import mlx_moe": ["-c", "import mlx_moe"],
    "mlxmoe --help": ["-m", "cli", "--help"],
    "mlx_lm.generate --help": ["-m", "mlx_lm", "generate", "--help"],
    "import mlx.core": ["-c", "import mlx.core"],
    "the MLX backend": ["-c", "import mlx_moe.model.trainer"],
    "import torch": ["-c", "import torch"],
    "the PyTorch backend": ["-c", "import torch_ref.trainer"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-gb", type=float)
    options = parser.parse_args()
    show(medians({name: started(command) for name, command in COMMANDS.items()}, options.rounds, 1), "python")
    if options.text and options.tokenizer:
        documents = options.text.read_text(encoding="utf-8").splitlines()
        print(f"\n{len(documents)} documents, {sum(map(len, documents)) / 1e6:.2f} M characters")
        show(medians(tokenizers(documents, options.tokenizer), options.rounds, 1), "transformers")
    if options.cache_gb:
        print(f"\na token cache of {options.cache_gb} GB")
        show(opened_twice(int(options.cache_gb * 1e9)), "the first time")


def started(arguments: list[str]) -> Callable[[], object]:
    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def tokenizers(documents: list[str], folder: Path) -> dict[str, Callable[[], object]]:
    from transformers import AutoTokenizer

    from mlx_moe.data.tokenizers import Tokenizer

    own, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    return {"ours": lambda: own.encode_batch(documents), "transformers": lambda: theirs(documents)["input_ids"]}


def opened_twice(n_bytes: int) -> dict[str, float]:
    """Return the seconds of opening a token cache of random ids for the first time, and again."""
    from mlx_moe.config import DataConfig
    from mlx_moe.data.tokens import prepare

    config = DataConfig(source="stories", n_documents=2000, tokenizer="char")
    with tempfile.TemporaryDirectory() as name:
        data = prepare(config, Path(name))  # an entry to fill with the ids
        folder, digest, n_tokens = data.train.path.parent, hashlib.sha256(), n_bytes // data.train.dtype.itemsize
        ids = np.random.default_rng(0).integers(data.tokenizer.vocab_size, size=1 << 22, dtype=data.train.dtype)
        with data.train.path.open("wb") as file:
            for start in range(0, n_tokens, len(ids)):
                part = ids[: n_tokens - start].tobytes()
                digest.update(part)
                file.write(part)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["train"] |= {"tokens": n_tokens, "sha256": digest.hexdigest()}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        (folder / "verified.json").unlink()
        seconds = {}
        for when in ("the first time", "again"):
            start_time = time.perf_counter()
            opened = prepare(config, Path(name))
            seconds[when] = time.perf_counter() - start_time
            assert len(opened.train) == n_tokens, "the cache was rebuilt"
    return seconds


if __name__ == "__main__":
    main()
