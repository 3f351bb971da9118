"""The interface of a backend, and the choice of one for a machine.

B batch, T time, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_moe.accounting import machines
from mlx_moe.address_space import bytes_left
from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import BackendName, Device
from mlx_moe.errors import InputError
from mlx_moe.extras import how_to_install, is_installed
from mlx_moe.inference.decoder import Decoder
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.precision import Precision, PrecisionName
from mlx_moe.processes import ProcessGroup, SingleProcess
from mlx_moe.transfer.plan import Plan

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]

# What starts several processes, and for which backend, by a variable that it sets.
LAUNCHERS: dict[str, tuple[str, BackendName]] = {
    "TORCHELASTIC_RUN_ID": ("torchrun", "torch"),
    "MLX_RANK": ("mlx.launch", "mlx"),
}
BYTES_TO_LOAD = {"mlx": 400_000_000, "torch": 800_000_000}  # of address space; measured: 240 and 510 MB, and threads
TRAINERS: dict[BackendName, str] = {"mlx": "mlx_moe.model.trainer", "torch": "torch_ref.trainer"}


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of an optimizer step. `loss` = `cross_entropy` (nats per token) + the auxiliary terms."""

    loss: float
    cross_entropy: float
    grad_norm: float
    expert_load_LE: NDArray[np.float32] | None = None  # share of each layer's assignments; None in a dense model
    router_entropy_L: NDArray[np.float32] | None = None  # nats, mean over tokens; None in a dense model


@dataclass(frozen=True)
class RoutedLogits:
    """Logits with the routing that produced them; L is 0 without experts. N = B·T, in the order of the tokens."""

    logits_BTV: Logits
    router_logits_LNE: NDArray[np.float32]
    experts_LNK: NDArray[np.int64]

    @classmethod
    def stack(cls, logits_BTV: Logits, routings: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> RoutedLogits:
        """Return the logits with each layer's routing: router logits (N, E) and experts (N, K)."""
        router_logits, experts = zip(*routings, strict=True) if (routings := list(routings)) else ((), ())
        return cls(logits_BTV, np.array(router_logits), np.array([np.asarray(nk, np.int64) for nk in experts]))


def local_batch(world: ProcessGroup, tokens_BT1: Tokens) -> Tokens:
    """Return a process's share of a global batch; all of a batch that does not divide evenly."""
    share, rest = divmod(len(tokens_BT1), world.size)
    return tokens_BT1 if rest else tokens_BT1[world.rank * share : (world.rank + 1) * share]


class TrainingStep(Protocol):
    def __call__(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        """Train on a global batch (B, T + 1). Calling the result waits for the device and returns the metrics."""


class Trainer(Protocol):
    """A model, and its optimizer if it has one, on one device or sharded over the devices of several processes.

    Without an optimizer it serves for inference: what needs one raises InputError.

    Every process calls the same methods in the same order, with the same global batches, and gets the same results.
    """

    config: ModelConfig
    device: Device
    precision: Precision

    @property
    def world(self) -> ProcessGroup: ...

    @property
    def module(self) -> Any:
        """The `mlx.nn.Module` or `torch.nn.Module` that computes."""

    @property
    def step(self) -> TrainingStep:
        """Losses → gradients → clip → update, in the backend's file `step.py`."""

    def loss(self, tokens_BT1: Tokens) -> float:
        """Return the mean cross entropy, nats per token, without dropout."""

    def logits(self, tokens_BT: Tokens) -> Logits:
        """Return the logits (B, T, V), float32, without dropout."""

    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        """Return the logits with their routing; `experts_LNK` replaces the routers' choices."""

    def module_output(self, name: str, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output of one module, named like its parameters, in fp32; the first of several."""

    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        """Return the share of each layer's assignments that each expert takes, (L, E); None in a dense model."""

    def decoder(self) -> Decoder: ...

    def weights(self) -> Arrays: ...

    def optimizer_state(self) -> Arrays:
        """Return the tensors of `parameters.optimizer_table`, and in fp16 the loss scale."""

    def lazy_state(self) -> tuple[Weights, Weights]:
        """Return weights and optimizer state to save; each array is copied when asked for, if possible."""

    def load_optimizer_state(self, state: Arrays) -> None: ...

    def apply_transfer(self, plan: Plan, carry: bool = False) -> Trainer:
        """Return a new trainer on this device, with the plan applied to these weights.

        Its optimizer starts fresh, or with `carry` from these moments through the plan and the same count of steps.
        """

    def peak_memory_bytes(self) -> int: ...


class StreamedModel(Protocol):
    """A model whose weights are fetched a layer at a time and freed again; float32, for inference."""

    config: ModelConfig

    def each_logits(self, tokens_BT: Tokens) -> Iterator[Logits]:
        """Yield the logits (T, V) of each sequence. All sequences go through the layers together."""

    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        """Return the same as `Trainer.routed_logits`."""

    def ffn_inputs(self, tokens_BT: Tokens, layers: Collection[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the inputs (N, D) of these layers' FFNs, or of routers in their place, in rising order."""


class TrainerFactory(Protocol):
    def __call__(
        self,
        config: ModelConfig,
        weights: Weights,
        optimizer: OptimizerConfig | None = None,
        device: str | Device = "auto",
        engine: EngineConfig = EngineConfig(),
    ) -> Trainer: ...


class DeviceModule(Protocol):
    """A backend's module `device`. Devices are asked for by name (`auto`, `cpu`, `gpu`) or by a Device."""

    def choose_device(self, requested: str | Device) -> Device:
        """Return the device asked for. Raises InputError for one that the backend or this machine lacks."""

    def measure_flops_per_s(self, precision: PrecisionName, device: str | Device = "auto") -> float:
        """Return the operations per second of a large matrix product, measured in half a second."""

    def device_name(self, device: str | Device = "auto") -> str:
        """Return the system's name for the device."""

    def usable_bytes(self, device: str | Device = "auto") -> int:
        """Return the memory that training can take on the device."""

    def threads(self) -> int | None:
        """Return the number of threads of a product on the CPU; None if it is not known."""

    def instructions(self) -> str | None:
        """Name the instructions of products on the CPU; None if they are not known."""

    def set_threads(self, n: int) -> None:
        """Set the number of threads of a product on the CPU, where the backend can."""


@dataclass(frozen=True)
class Backend:
    """A chosen backend, and the reason in words."""

    name: BackendName
    reason: str

    @property
    def trainer(self) -> TrainerFactory:
        factory: TrainerFactory = self._module("trainer").Trainer
        return factory

    def streamed(self, config: ModelConfig, weights: Weights, device: str | Device = "auto") -> StreamedModel:
        module = self._module("streaming")
        model: StreamedModel = module.StreamedModel(config, weights, device)
        return model

    @property
    def device(self) -> DeviceModule:
        """Load the backend's module `device`."""
        module: DeviceModule = self._module("device")
        return module

    def connect(self) -> ProcessGroup:
        """Join the processes of `torchrun` or `mlx.launch`; a group of one without them."""
        if self.name == "torch" and "WORLD_SIZE" not in os.environ:
            return SingleProcess()  # as PyTorch would say, without the seconds that it takes to load
        world: ProcessGroup = self._module("distributed").connect()
        return world

    def _module(self, name: str) -> Any:
        """Load a module of the backend. Raises InputError if its library would end the process for want of memory."""
        package = TRAINERS[self.name].rpartition(".")[0]
        left = None if package in sys.modules else bytes_left()
        if left is not None and left < BYTES_TO_LOAD[self.name]:
            raise InputError(
                f"{self.name} needs {BYTES_TO_LOAD[self.name] / 1e9:.1f} GB of memory to load, and this process may "
                f"take {max(left, 0) / 1e9:.1f} GB more (ulimit -v); raise that limit"
            )
        return importlib.import_module(f"{package}.{name}")


def launcher() -> tuple[str, BackendName] | None:
    """Return the program that started this process beside others, and its backend; None if there is none."""
    return next((found for variable, found in LAUNCHERS.items() if variable in os.environ), None)


def choose_backend(requested: str = "auto") -> Backend:
    """Return MLX on Apple Silicon, else PyTorch; or the one requested, or the one whose launcher started this process.

    Raises InputError where it is not installed.
    """
    if (launched := launcher()) is not None:
        program, name = launched
        if requested not in ("auto", name):
            raise InputError(f"--backend {requested}: {program} starts {name}; leave --backend out")
        return Backend(name, f"{name}, as {program} started it")
    if requested == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        order: list[BackendName] = ["mlx", "torch"] if apple else ["torch", "mlx"]
        for name in order:
            if is_installed(name):
                machine = "Apple Silicon" if apple else f"{platform.system()} {platform.machine()}"
                return Backend(
                    name, f"{name} on {machine}" + ("" if name == order[0] else f"; {order[0]} is not installed")
                )
        raise InputError(f"neither mlx nor torch is installed; {how_to_install(*TRAINERS)}, or one of them")
    for name in TRAINERS:
        if name == requested:
            if not is_installed(name):
                raise InputError(
                    f"--backend {name}: {name} is not installed; {how_to_install(name)}, or take --backend auto"
                )
            return Backend(name, f"{name} as asked for")
    raise InputError(f"--backend {requested!r}: must be one of auto, {', '.join(TRAINERS)}")


@cache
def peak_flops_per_s(backend: Backend, precision: PrecisionName, device: Device) -> float:
    """Return the device's peak if its name is known, else the measured rate of large matrix products."""
    machine = None if device.kind == "cpu" else machines.lookup(backend.device.device_name(device))
    if machine is not None:
        return machine.flops_per_s(precision)
    return backend.device.measure_flops_per_s(precision, device)
