"""Peak memory of a training step, from the arrays alive at its largest moments.

A step has three candidates: the loss, when everything for the backward pass is kept and the logits are in use; the
backward pass of the last block; the update, when all gradients exist. What each backend keeps was derived from its
operations and checked by measurement: `benchmarks/plan_memory.py`.

N tokens of a micro-batch, T time, D model, Q query heads' width, G key-value heads' width, H heads, F neurons of an
FFN, E experts, R rows through an FFN (N, or the assignments to experts), V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from mlx_moe.accounting.parameters import counted_table
from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import BackendName, DeviceKind
from mlx_moe.kernel_sizes import (
    MLX_EXPERT_ROWS,
    MLX_LOGITS,
    MLX_QUERIES,
    MLX_UPDATE_PART,
    MLX_UPDATED_AT_ONCE,
    TORCH_LOGITS,
)
from mlx_moe.parameters import FFN_INPUTS, Parameter, layer_of

FLOAT = 4

# Arrays of R × F that MLX keeps per FFN: the activation's input, its output, and what its formula and its gradient both
# compute, which `mx.compile` computes once and keeps. On CPU, `mlx_moe/model/cpu` has gradients of its own.
MLX_KEPT_NEURONS = {
    "cpu": {"gelu": 2, "gelu_tanh": 2, "silu": 2, "relu": 2, "leaky_relu": 3},
    "gpu": {"gelu": 4, "gelu_tanh": 5, "silu": 3, "relu": 2, "leaky_relu": 3},
}
# MLX frees an array once the device has passed it, and the program runs up to ten command buffers (of ten operations,
# on CPU) ahead of the device. These many arrays, with rows of D, F, T and V numbers, are pending when the loss is
# computed. On CPU, GELU's and the loss's polynomials exceed one kernel, and pass arrays between their kernels.
MLX_WAITING_RESIDUAL = 16
MLX_WAITING_SCORES = 1.5
MLX_WAITING_NEURONS = {"gelu": 3, "gelu_tanh": 3, "silu": 3, "relu": 1, "leaky_relu": 1}
# Arrays of a chunk of logits (MLX_LOGITS numbers) that stand at a time, with one chunk alone and with several.
MLX_LOGITS_ARRAYS = {"cpu": (6, 18), "gpu": (3, 5)}
MLX_UPDATES_AHEAD = 140  # tensors whose old and new weights and moments are there at once, on CPU
METAL_COMMAND_BUFFERS, METAL_COMMAND_BUFFER_BYTES = 10, 50 << 20  # mlx/backend/metal/device.cpp, scheduler.h

MUON_ARRAYS = 4  # while PyTorch makes a matrix orthogonal: its mean gradient, normed, before and after an iteration
TORCH_RUNTIME = 345 << 20  # a process that has trained a tiny model: PyTorch's code, its threads, NumPy


@dataclass(frozen=True)
class StepMemory:
    """Bytes at a step's peak.

    `activations` are kept by the forward pass, `logits` added by the loss; `moments` are the totals at each candidate.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    moments: dict[str, int]

    @property
    def kept(self) -> int:
        """Bytes alive when the loss is computed: activations and logits."""
        return self.activations + self.logits

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda moment: self.moments[moment])

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak, "peak_moment": self.peak_moment}


def step_memory(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    batch_size: int,
    backend: BackendName,
    device: DeviceKind,
) -> StepMemory:
    """Return the peak bytes of training steps on one device; `engine.precision` "auto" counts as fp32."""
    is_half = engine.precision in ("bf16", "fp16")
    # On CPU, MLX rounds to half precision, and keeps the rounded numbers in float32 (`model/functional.py`).
    half = 2 if is_half and (backend, device) != ("mlx", "cpu") else FLOAT
    sizes = _sizes(config)
    weights = FLOAT * sizes.all
    gradients = FLOAT * sizes.trained
    moments = 2 * gradients - FLOAT * (sizes.hidden_matrices if optimizer.name == "muon" else 0)
    N = math.ceil(batch_size / engine.accumulation_steps) * config.context_length
    NV = N * config.vocab_size

    n_mixtures = len(config.expert_layers)
    kinds = {True: n_mixtures, False: config.n_layers - n_mixtures}
    blocks = {kind: _Block(config, kind, N, half, backend, device) for kind, count in kinds.items() if count}
    working = max(block.working for block in blocks.values())
    casts = half * sizes.matrices if is_half else 0  # the weights in the precision of the products
    kept = N * config.d_model * (FLOAT + half)  # the last norm's input and output
    if engine.activation_checkpointing:
        kept += config.n_layers * N * config.d_model * FLOAT
        recomputed = max(block.kept for block in blocks.values()) + casts // config.n_layers
    else:
        kept += sum(kinds[kind] * block.kept for kind, block in blocks.items()) + casts
        recomputed = 0
    held = weights + moments + (TORCH_RUNTIME if (backend, device) == ("torch", "cpu") else 0)
    summed = gradients if engine.accumulation_steps > 1 else 0  # accumulated gradients of earlier parts

    if backend == "torch":
        # Per chunk: the logits and their gradient, in float32 and in the products' precision, and the resulting
        # gradients.
        chunk = NV / max(1, math.ceil(NV / TORCH_LOGITS[device]))
        head = 0 if config.lora else config.vocab_size * config.d_model
        rounded = 0 if half == FLOAT else chunk + head
        logits = int(chunk * (half + FLOAT) + rounded * half + head * FLOAT + N * config.d_model * half)
        loss = kept + logits
        backward = kept + recomputed + working + FLOAT * (sizes.block + head)
        # The embedding's gradient is as large as the embedding, even where it only adds the head's.
        update = gradients + FLOAT * sizes.largest[0] * (MUON_ARRAYS if optimizer.name == "muon" else 1)
    else:
        chunk = min(NV, MLX_LOGITS[device])
        logits = chunk * (MLX_LOGITS_ARRAYS[device][chunk < NV] * FLOAT + (half if half != FLOAT else 0))
        if chunk < NV:  # the head's gradient before and after a chunk, and its input's
            logits += (2 * config.vocab_size * FLOAT + N * half) * config.d_model
        loss = kept + logits + working
        backward = kept + chunk * FLOAT + recomputed + working
        update = gradients + max(summed, _mlx_updates(sizes, device))
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        activations=kept,
        logits=logits,
        runtime=held - weights - moments,
        moments={
            "loss": held + summed + loss,
            "backward": held + summed + backward,
            "update": held + update,
        },
    )


class _Sizes(NamedTuple):
    """Element counts.

    All parameters; trained ones; matrices; matrices trained by Muon; trained parameters of experts, and of the largest
    block. Then the number of trained tensors and the sizes of the largest.
    """

    all: int
    trained: int
    matrices: int
    hidden_matrices: int
    experts: int
    block: int
    n_trained_tensors: int
    largest: tuple[int, ...]


@lru_cache(maxsize=8)
def _sizes(config: ModelConfig) -> _Sizes:
    rows = [(parameter, number, math.prod(parameter.shape)) for parameter, number in counted_table(config)]
    trained = [row for row in rows if row[0].is_trained]
    inside = [row for row in trained if layer_of(row[0].name) is not None]
    largest = sorted(
        (size for _, number, size in trained for _ in range(min(number, METAL_COMMAND_BUFFERS))), reverse=True
    )
    blocks = [0] * config.n_layers
    for parameter, _, size in inside:
        blocks[layer_of(parameter.name) or 0] += size
    return _Sizes(
        all=_total(rows),
        trained=_total(trained),
        matrices=_total(row for row in rows if row[0].is_matrix),
        hidden_matrices=_total(row for row in trained if row[0].is_hidden_matrix),
        experts=_total(row for row in inside if ".experts." in row[0].name),
        block=max(blocks),
        n_trained_tensors=sum(number for _, number, _ in trained),
        largest=tuple(largest[:METAL_COMMAND_BUFFERS]),
    )


def _total(rows: Iterable[tuple[Parameter, int, int]]) -> int:
    return sum(number * size for _, number, size in rows)


class _Block:
    """Bytes that one block keeps for the backward pass (`kept`), and needs in addition while it runs (`working`)."""

    def __init__(
        self, config: ModelConfig, has_experts: bool, N: int, half: int, backend: BackendName, device: DeviceKind
    ):
        T, D, H = config.context_length, config.d_model, config.n_heads
        Q, G = H * config.head_dim, config.n_kv_heads * config.head_dim
        moe = config.moe if has_experts else None
        assignments = N * moe.top_k if moe else N
        on_mlx_cpu = (backend, device) == ("mlx", "cpu")
        R = assignments
        if moe and on_mlx_cpu:
            R = (-(-assignments // MLX_EXPERT_ROWS) + moe.n_experts) * MLX_EXPERT_ROWS
        RF = R * config.expert_d_ff + N * moe.shared_d_ff if moe else R * config.d_ff
        gated = config.ffn_type == "swiglu"
        scores = at_work = N * H * T
        if on_mlx_cpu and config.attention_backend == "sdpa":  # `mlx_moe.model.cpu.attention`
            block = min(T, MLX_QUERIES)
            scores, at_work = N * H * (T + block) // 2, N * H * block

        residual = 2 * N * D * FLOAT  # inputs of the two norms
        products = 2 * N * D * half  # outputs of the norms, inputs of projections
        norms = 0
        if on_mlx_cpu or (backend, device, config.normalization) == ("torch", "cpu", "rmsnorm"):
            norms = 2 * N * D * FLOAT  # the normalised rows; GPU kernels recompute them
        if config.qk_norm:  # inputs of the heads' norms, and their normalised rows
            norms += N * (Q + G) * FLOAT * (2 if device == "cpu" else 1)
        experts = 0
        if moe:
            gathered_and_scattered = 2 * (R if backend == "mlx" else assignments) * D * half
            router_input = N * D * FLOAT if half != FLOAT else 0
            indices = 4 * assignments * 8 + 3 * N * moe.n_experts * FLOAT
            one_hot = (len(FFN_INPUTS[config.ffn_type]) + 1) * assignments * moe.n_experts * half
            experts = gathered_and_scattered + router_input + indices
            experts += one_hot if config.bias and (backend, device) == ("torch", "gpu") else 0
        dropout = 2 * N * D * (1 if (backend, device) == ("torch", "gpu") else FLOAT) if config.dropout else 0
        if backend == "torch":
            attention = N * (Q + 2 * G + Q) * half  # queries, keys, values, output
            if config.attention_backend == "manual":
                attention = N * 4 * Q * half + scores * (FLOAT if half == FLOAT else FLOAT + half)
            elif device == "cpu" and config.position_encoding == "rope":
                attention += N * Q * half  # the output again, in o_proj's order
            in_and_out = 1 if config.activation == "relu" else 2  # ReLU's gradient needs only its output
            neurons = RF * half * (in_and_out + (2 if gated else 0))
            # Gradients of the neurons, of the experts' rows, and of the residual stream.
            self.working = (RF * (3 if gated else 2) + (2 * R * D if moe else 0)) * half + 3 * N * D * FLOAT
        else:
            attention = N * (Q + 2 * G + Q) * half + scores * half
            neurons = RF * half * (MLX_KEPT_NEURONS[device][config.activation] + (2 if gated else 0))
            waiting_neurons = 3 if gated else MLX_WAITING_NEURONS[config.activation]
            self.working = MLX_WAITING_RESIDUAL * N * D * FLOAT + waiting_neurons * RF * half
            self.working += int(MLX_WAITING_SCORES * at_work * half)
        self.kept = residual + products + norms + attention + neurons + experts + dropout


def _mlx_updates(sizes: _Sizes, device: DeviceKind) -> int:
    """Return the bytes of new weights and moments that exist before the old ones are freed."""
    total = sizes.trained
    if FLOAT * total > MLX_UPDATED_AT_ONCE:
        return 3 * max(MLX_UPDATE_PART, FLOAT * sizes.largest[0])
    # One of the three reuses the gradient's buffer if that is contiguous: with experts, not with projections.
    arrays = 3 - sizes.experts / total
    if device == "cpu":
        return int(arrays * FLOAT * total * min(1.0, MLX_UPDATES_AHEAD / sizes.n_trained_tensors))
    largest = (max(FLOAT * size, METAL_COMMAND_BUFFER_BYTES) for size in sizes.largest)
    return int(arrays * min(FLOAT * total, sum(largest)))
