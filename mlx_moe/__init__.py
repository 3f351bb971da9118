"""Small language models: train a dense one, upcycle it to a mixture of experts, grow it, without a loss spike.

    import mlx_moe as mm

    model, tokenizer = mm.load("runs/a")
    experts, certificate = mm.upcycle(model, n_experts=8, top_k=2)
    result = mm.train(experts, "stories", steps=100)
    print(mm.generate(result.model, tokenizer, "Once upon a time"))

Nothing is loaded until it is used: neither MLX nor PyTorch, and no network.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_moe.api import Data as Data
    from mlx_moe.api import Model as Model
    from mlx_moe.api import RunResult as RunResult
    from mlx_moe.api import TrainResult as TrainResult
    from mlx_moe.api import create as create
    from mlx_moe.api import evaluate as evaluate
    from mlx_moe.api import generate as generate
    from mlx_moe.api import grow as grow
    from mlx_moe.api import load as load
    from mlx_moe.api import parity as parity
    from mlx_moe.api import run as run
    from mlx_moe.api import save as save
    from mlx_moe.api import stream as stream
    from mlx_moe.api import tokens as tokens
    from mlx_moe.api import train as train
    from mlx_moe.api import upcycle as upcycle
    from mlx_moe.errors import Error as Error
    from mlx_moe.errors import InputError as InputError

_OF_API = (
    *("Data", "Model", "RunResult", "TrainResult", "create", "evaluate", "generate", "grow", "load", "parity", "run"),
    *("save", "stream", "tokens", "train", "upcycle"),
)
_ERRORS = ("Error", "InputError")
__all__ = [*_ERRORS, *_OF_API]


def __getattr__(name: str) -> Any:
    if name in _ERRORS:
        from mlx_moe import errors

        return getattr(errors, name)
    if name in _OF_API:
        from mlx_moe import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
