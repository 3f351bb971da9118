"""Change a module by hand, save it, and see that both backends compute the same with it."""

import tempfile
from pathlib import Path

import mlx_moe as mm

data = mm.tokens("stories", "char", n_documents=50)
model = mm.create("gpt2", data, d_model=32, n_layers=2, n_heads=2, context_length=32, backend="torch")
model.module.layers[0].mlp.down_proj.weight.data.mul_(0.5)  # an nn.Module of PyTorch, as it is

with tempfile.TemporaryDirectory() as folder:
    saved = model.save(Path(folder) / "halved")
    on_mlx, tokenizer = mm.load(saved, backend="mlx")
    tokens = tokenizer.encode("Once upon a time")
    print(f"MLX and PyTorch are {abs(on_mlx.logits(tokens) - model.logits(tokens)).max():.1e} apart")
    print("both agree with float64:", mm.parity(on_mlx).passed)
