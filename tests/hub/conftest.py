"""A model as others publish it, made once."""

import pytest
from support.published_models import save, save_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a small Llama and its tokenizer, for tests to copy."""
    folder = tmp_path_factory.mktemp("llama")
    save("llama", folder)
    save_tokenizer(folder)
    return folder
