"""Sizes of blocks, chunks and parts that the backends compute in; speed and memory depend on them."""

# Rows of one product of experts on MLX's CPU, where a row by itself is a matrix-vector product.
MLX_EXPERT_ROWS = 64
# Queries of one block of attention on MLX's CPU.
MLX_QUERIES = 64
# Numbers of a chunk of logits in MLX's loss: 333 tokens of 50,257 words on CPU, 667 on GPUs.
MLX_LOGITS = {"cpu": 1 << 24, "gpu": 1 << 25}
# MLX updates a model whose weights take more than the first of these bytes in parts of the second, or of one tensor.
MLX_UPDATED_AT_ONCE, MLX_UPDATE_PART = 1 << 30, 1 << 28
# Numbers of a chunk of logits in PyTorch's loss: 667 tokens of 50,257 words on CPU, 5,341 on GPUs. A chunk reads and
# writes the head's whole gradient, which a device that is faster at products feels sooner.
TORCH_LOGITS = {"cpu": 1 << 25, "gpu": 1 << 28}
