"""DATA.md: source, licence, split and size of a run's text."""

from __future__ import annotations

from typing import Any

from mlx_moe.data.tokens import SPLITS
from mlx_moe.storage.atomic import signature
from mlx_moe.terminal import plain_markdown


def describe(provenance: dict[str, Any]) -> str:
    """Return Markdown from the provenance of `TokenData`, which is also a run's data.json."""
    source, tokenizer = provenance["source"], provenance["tokenizer"]
    held_out = f"{100 * provenance['validation_fraction']:g} %"
    how = {
        "by document": f"a document is held out by the hash of its text (BLAKE2b), {held_out} of them: it stays on its "
        "side when the data grows, and copies of it fall on one side",
        "by token": f"the last {held_out} of the tokens are held out, since the text is too few documents to share out",
    }
    splits = [provenance[name] for name in SPLITS]
    rows = [
        ("documents", [f"{split['documents']:,}" for split in splits]),
        ("tokens", [f"{split['tokens']:,}" for split in splits]),
        ("bytes of UTF-8", [f"{split['bytes']:,}" for split in splits]),
        ("bytes per token", [f"{split['bytes'] / split['tokens']:.3f}" for split in splits]),
        ("SHA-256 of the tokens", [f"`{split['sha256']}`" for split in splits]),
    ]
    table = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows)
    return (
        f"<!-- {signature('data describe')} -->\n# Data\n\n"
        f"- Source: {plain_markdown(source['description'])}\n"
        f"- Licence: {plain_markdown(source.get('licence') or 'not known here; ask where the files came from')}\n"
        f"- Identity: `{source['identity']}`\n"
        f"- Tokenizer: {plain_markdown(tokenizer['spec'])}, {tokenizer['vocab_size']:,} tokens, "
        f"SHA-256 `{tokenizer['identity']}`\n"
        f"- Split: {how[provenance['split']]}\n\n"
        "| | train | validation |\n|---|---|---|\n"
        f"{table}\n"
        "Every document ends with one token of its own, which counts as a token and not as bytes.\n"
    )
