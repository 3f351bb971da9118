"""Greedy generation with a cache: both our backends, mlx-lm and transformers on one model.

    python benchmarks/generation.py MODEL [--tokens 512] [--prompt-tokens 16] [--only NAME,NAME]

MODEL is a Hugging Face folder that all of them read, with a context of at least all tokens. Each library generates in a
process of its own, float32, on the CPU. They take turns of 16 tokens, so that a turn of each falls on the same moment
and the same positions. Prints for each: milliseconds per token, wall and CPU, at token 50 and at the end, and the ratio
of the two; then the median ratio of its turns to those of its peer (ours on MLX to mlx-lm's, ours on PyTorch to
transformers'); then all as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PEERS = {"mlx": "mlx-lm", "torch": "transformers"}
KINDS = tuple(kind for pair in PEERS.items() for kind in pair)
TURN = 16
WINDOW = 3  # turns around token 50, and at the end
Times = list[tuple[float, float]]  # of each turn: wall and CPU seconds per token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--only", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        prompt = [(7 * i) % 1000 + 100 for i in range(options.prompt_tokens)]
        generate = ours if options.child in PEERS else theirs
        generate(options.child, options.model, prompt, options.tokens, Turns().on_token)
        return
    times = take_turns(options.only.split(","), options.tokens // TURN)
    report(times, options.tokens)


def take_turns(kinds: list[str], n_turns: int) -> dict[str, Times]:
    children: dict[str, subprocess.Popen[str]] = {}
    for kind in kinds:
        command = [sys.executable, *sys.argv, "--child", kind]
        children[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _answer(children[kind])  # it is loaded before the next one begins to
    times: dict[str, Times] = {kind: [] for kind in kinds}
    for _ in range(n_turns):
        for kind, child in children.items():
            assert child.stdin
            child.stdin.write("\n")
            child.stdin.flush()
            wall, cpu = json.loads(_answer(child))
            times[kind].append((wall, cpu))
    for child in children.values():
        child.communicate()
    return times


def report(times: dict[str, Times], n_tokens: int) -> None:
    rows = []
    first = max(0, 50 // TURN - WINDOW // 2)
    for kind, turns in times.items():
        early, late = turns[first : first + WINDOW], turns[-WINDOW:]
        row: dict[str, object] = {"kind": kind, "tokens": n_tokens}
        for i, clock in enumerate(("wall", "cpu")):
            at_50, at_end = (statistics.median(turn[i] for turn in part) * 1e3 for part in (early, late))
            row |= {f"{clock}_ms_at_50": at_50, f"{clock}_ms_at_end": at_end, f"{clock}_growth": at_end / at_50}
            if (peer := PEERS.get(kind)) in times:
                pairs = zip(turns, times[str(peer)], strict=True)
                row[f"{clock}_over_{peer}"] = statistics.median(one[i] / other[i] for one, other in pairs)
        rows.append(row)
        print(
            "  ".join(f"{name} {value:.3f}" if isinstance(value, float) else str(value) for name, value in row.items())
        )
    print(json.dumps(rows))


class Turns:
    """Pauses generation after every 16 tokens until the parent writes a line, and answers with the seconds per token.

    A turn is timed from its first token, which a library that computes ahead has ready, to its last.
    """

    def __init__(self) -> None:
        self._count = 0
        self._started = (0.0, 0.0)

    def on_token(self) -> None:
        if self._count % TURN == 0:
            if self._count == 0:
                print("loaded", flush=True)
            sys.stdin.readline()
        self._count += 1
        if self._count % TURN == 1:
            self._started = time.perf_counter(), time.process_time()
        elif self._count % TURN == 0:
            ended = time.perf_counter(), time.process_time()
            print(json.dumps([(b - a) / (TURN - 1) for a, b in zip(self._started, ended, strict=True)]), flush=True)


OnToken = Callable[[], None]


def ours(backend: str, folder: Path, prompt: list[int], n: int, on_token: OnToken) -> None:
    from mlx_moe.hub.models import open_model
    from mlx_moe.inference.decoding import generate_tokens
    from mlx_moe.training.backend import choose_backend

    loaded = open_model(folder)
    trainer = choose_backend(backend).trainer(loaded.config, loaded.weights, device="cpu")
    for _ in generate_tokens(trainer, prompt, n):
        on_token()


def theirs(library: str, folder: Path, prompt: list[int], n: int, on_token: OnToken) -> None:
    if library == "transformers":
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.generation.streamers import BaseStreamer

        class Streamer(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                if value.numel() == 1:  # the prompt comes first
                    on_token()

            def end(self) -> None: ...

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        lengths = {"max_new_tokens": n, "min_new_tokens": n}
        model.generate(torch.tensor([prompt]), **lengths, do_sample=False, pad_token_id=0, streamer=Streamer())
        return
    import mlx_moe.model  # noqa: F401  # the fast BLAS, before MLX

    # isort: split
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    for _ in generate_step(mx.array(prompt), model, max_tokens=n):
        on_token()


def _answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{child.args} ended with {child.wait()}")
    return line


if __name__ == "__main__":
    main()
