"""Greedy generation with a cache: both our backends, mlx-lm and transformers on one model.

    python benchmarks/generation.py SmolLM2-135M [--tokens 64] [--prompt-tokens 16] [--rounds 5] [--only NAME,NAME]

The model is a Hugging Face folder that all of them read. Each runs in its own process, alternately, float32. Prints
milliseconds for all tokens and their ratio to mlx-lm's, tokens per second, then JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interleaved import Child, medians, serve, show

KINDS = ("mlx", "torch", "mlx-lm", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prompt = [(7 * i) % 1000 + 100 for i in range(options.prompt_tokens)]
    if options.child:
        run = ours if options.child in ("mlx", "torch") else theirs
        serve(run(options.child, options.model, prompt, options.tokens))
        return
    children = {kind: Child(*sys.argv[1:], "--child", kind) for kind in options.only.split(",")}
    seconds = medians(children, options.rounds, warm_up=1)
    show(seconds, "mlx-lm" if "mlx-lm" in seconds else next(iter(seconds)), **vars(options) | {"model": ""})
    for kind, one in seconds.items():
        print(f"{kind}: {options.tokens / one:.1f} tokens per second")


def ours(backend: str, folder: Path, prompt: list[int], n: int) -> Callable[[], Any]:
    from mlx_moe.hub.models import open_model
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.training.generation import generate

    loaded = open_model(folder)
    trainer = choose_backend(backend).trainer(loaded.config, loaded.weights, device="cpu")
    return lambda: list(generate(trainer, prompt, n))


def theirs(library: str, folder: Path, prompt: list[int], n: int) -> Callable[[], Any]:
    if library == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return lambda: model.generate(
            torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
        )
    import mlx_moe.model  # noqa: F401  # the fast BLAS, before MLX

    # isort: split
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda: list(generate_step(mx.array(prompt), model, max_tokens=n))


if __name__ == "__main__":
    main()
