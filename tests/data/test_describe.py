import hashlib

from mlx_moe.config import DataConfig
from mlx_moe.data.sources import open_source
from mlx_moe.data.tokens import held_out, prepare


def test_data_md_says_where_text_comes_from_and_how_much_there_is(mlxmoe, tmp_path):
    out = tmp_path / "DATA.md"
    result = mlxmoe(
        "data", "describe", "--data", "stories", "--tokenizer", "bpe:300", "-o", "data.n_documents=150", "--out", out
    )
    assert result.code == 0, result.err
    text = out.read_text()
    data = prepare(DataConfig(source="stories", n_documents=150, tokenizer="bpe:300"), tmp_path / "cache")
    for said in (
        "150 embedded stories",
        "MIT",
        f"{len(data.train):,} | {len(data.validation):,}",
        hashlib.sha256(data.train[:].tobytes()).hexdigest(),
        "by the hash of its text",
    ):
        assert said in text


def test_licences():
    assert "CDLA-Sharing-1.0" in open_source(DataConfig()).licence
    assert open_source(DataConfig(source="stories")).licence.startswith("MIT")


def test_files_of_the_user_have_no_known_licence(mlxmoe, tmp_path):
    (tmp_path / "a.txt").write_text("one long text\n" * 100)
    result = mlxmoe("data", "describe", "--data", tmp_path / "a.txt", "--tokenizer", "char", "--out", tmp_path / "D.md")
    assert result.code == 0, result.err
    text = (tmp_path / "D.md").read_text()
    assert "Licence: not known here" in text
    assert "the last 5 % of the tokens are held out" in text


def test_names_of_others_are_text_and_nothing_else(mlxmoe, tmp_path):
    folder = tmp_path / "q\n# Injected <img src=x>\x1b[31m\u202e"
    folder.mkdir()
    (folder / "a.txt").write_text("one long text\n" * 100)
    result = mlxmoe("data", "describe", "--data", folder, "--tokenizer", "char", "--out", tmp_path / "D.md")
    assert result.code == 0, result.err
    text = (tmp_path / "D.md").read_text()
    assert not any(part in text for part in ("\x1b", "\u202e", "<img"))
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Data"]


def test_the_text_held_out_is_that_of_the_tokens(tmp_path):
    config = DataConfig(source="stories", n_documents=150, tokenizer="bpe:300")
    data = prepare(config, tmp_path)
    ids = [token for text in held_out(config) for token in [*data.tokenizer.encode(text), data.tokenizer.eot_id]]
    assert ids == data.validation[:].tolist()


def test_no_more_is_read_than_is_asked_for(tmp_path):
    lines = [f'{{"text": "document {n}"}}' for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "not JSON"]))
    held = held_out(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="char"))
    assert next(held).startswith("document")
