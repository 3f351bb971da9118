"""What a user waits for before anything is computed: starting a command, loading a backend, making tokens of text.

    python benchmarks/start_up.py [--text FILE] [--tokenizer FOLDER] [--rounds 5]

Commands in processes of their own, in turns. With a text of one document a line and a Hugging Face tokenizer, ours
makes token ids of the documents beside transformers' own call. Prints milliseconds and ratios, then JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    options = parser.parse_args()
    show(medians({name: started(command) for name, command in COMMANDS.items()}, options.rounds, 1), "python")
    if options.text and options.tokenizer:
        documents = options.text.read_text(encoding="utf-8").splitlines()
        print(f"\n{len(documents)} documents, {sum(map(len, documents)) / 1e6:.2f} M characters")
        show(medians(tokenizers(documents, options.tokenizer), options.rounds, 1), "transformers")


def started(arguments: list[str]) -> Callable[[], object]:
    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def tokenizers(documents: list[str], folder: Path) -> dict[str, Callable[[], object]]:
    from transformers import AutoTokenizer

    from mlx_moe.data.tokenizers import Tokenizer

    own, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    return {"ours": lambda: own.encode_batch(documents), "transformers": lambda: theirs(documents)["input_ids"]}


if __name__ == "__main__":
    main()
