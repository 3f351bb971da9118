"""Grow a dense model twice and upcycle it at the end; watch the loss go on where it stood."""

import mlx_moe as mm

data = mm.tokens("stories", "bpe:400", n_documents=200)
model = mm.create("llama", data, d_model=32, n_layers=2, n_heads=2, context_length=64)
result = mm.train(model, data, steps=60, learning_rate=3e-3)
for size in ({"d_model": 48, "n_layers": 3}, {"d_model": 64, "n_layers": 4}):
    larger, certificate = mm.grow(result.model, **size)
    before, result = result, mm.train(larger, data, steps=40, learning_rate=2e-3)
    first = result.metrics[0]["validation_loss"]  # before the first step
    print(f"{larger}: {before.validation_loss:.4f} -> {first:.4f} at the boundary, {result.validation_loss:.4f} after")
experts, certificate = mm.upcycle(result.model, n_experts=4)
print(f"{experts}: lossless {certificate.passed}")
