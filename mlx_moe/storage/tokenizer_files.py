"""Copying of a tokenizer's files."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_moe.errors import InputError
from mlx_moe.storage.reading import own_file

# Files that may come with a tokenizer: its own, and the chat template.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)

LARGEST_FILE = 64 << 20  # bytes; the largest published tokenizers have 33 MB


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, and nothing else, from a folder that may hold more.

    Raises InputError if one links outside the folder, or is too large.
    """
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (file := own_file(source, name)) is not None:
            if (size := file.stat().st_size) > LARGEST_FILE:
                raise InputError(
                    f"{file} has {size:,} bytes, and at most {LARGEST_FILE:,} are read; is it a tokenizer's?"
                )
            shutil.copyfile(file, target / name)
