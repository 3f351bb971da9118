from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and a real tokenizer, kept beside the repository since they are too large for it."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: it holds tinyshakespeare.txt, tinystories-sample.jsonl and gpt2/")
    return folder
