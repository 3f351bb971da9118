"""Runs that take about a second."""

SIZE = [
    *("-o", "model.d_model=32", "-o", "model.n_layers=2", "-o", "model.n_heads=2", "-o", "model.context_length=32"),
    *("-o", "data.n_documents=100", "-o", "data.validation_fraction=0.2", "-o", "training.batch_size=4"),
    *("-o", "training.eval_every=5", "-o", "training.log_every=5", "-o", "phases.moe.n_experts=4"),
    *("-o", "training.eval_sequences=8", "-o", "training.checkpoint_every=5"),
]


def train(mlxmoe, out, *options, phases=1, tokenizer="bpe:300"):
    result = mlxmoe(
        *("train", "--preset", "demo", "--data", "stories", "--tokenizer", tokenizer, "--phases", phases),
        *("--backend", "torch", "--device", "cpu", "--out", out, "--steps", 10, *SIZE, *options),
    )
    assert result.code == 0, result.err
    return out
