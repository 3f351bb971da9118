"""From a list of texts to a mixture of experts that writes: the ten lines of the README."""

import mlx_moe as mm

texts = [
    f"One day a {colour} {animal} met {n} friends and they all played."
    for n in range(2, 12)
    for colour in ("red", "small", "happy", "old")
    for animal in ("cat", "dog", "bird", "fox", "bear")
]
data = mm.tokens(texts, "char")
model = mm.create("llama", data, d_model=64, n_layers=2, n_heads=4, context_length=64)
dense = mm.train(model, data, steps=100, learning_rate=3e-3)
experts, certificate = mm.upcycle(dense.model, n_experts=4, top_k=2)
print(f"largest difference of a logit {certificate.max_logit_difference:.1e}, lossless: {certificate.passed}")
result = mm.train(experts, data, steps=50, learning_rate=1e-3)
print(f"validation loss {dense.validation_loss:.3f} -> {result.validation_loss:.3f} nats per token")
print(mm.generate(result.model, data.tokenizer, "One day a", 40, temperature=0))
