import pytest

from mlx_moe.errors import InputError
from mlx_moe.training import backend
from mlx_moe.training.backend import choose_backend, is_installed

MACHINES = {"Mac": ("darwin", "Darwin", "arm64"), "Intel Mac": ("darwin", "Darwin", "x86_64")}
MACHINES |= {"Linux": ("linux", "Linux", "x86_64"), "Linux on ARM": ("linux", "Linux", "aarch64")}


@pytest.fixture
def on(monkeypatch):
    """Pretend to be on a machine where some backends are installed."""

    def pretend(machine, *installed):
        platform, system, architecture = MACHINES[machine]
        monkeypatch.setattr(backend.sys, "platform", platform)
        monkeypatch.setattr(backend.platform, "system", lambda: system)
        monkeypatch.setattr(backend.platform, "machine", lambda: architecture)
        monkeypatch.setattr(backend, "is_installed", lambda name: name in installed)

    return pretend


@pytest.mark.parametrize(
    ("machine", "name", "reason"),
    [
        ("Mac", "mlx", "mlx on Apple Silicon"),
        ("Intel Mac", "torch", "torch on Darwin x86_64"),
        ("Linux", "torch", "torch on Linux x86_64"),
        ("Linux on ARM", "torch", "torch on Linux aarch64"),
    ],
)
def test_auto_takes_what_suits_the_machine(on, machine, name, reason):
    on(machine, "mlx", "torch")
    chosen = choose_backend()
    assert (chosen.name, chosen.reason) == (name, reason)


@pytest.mark.parametrize(("machine", "name", "missing"), [("Mac", "torch", "mlx"), ("Linux", "mlx", "torch")])
def test_auto_takes_the_other_and_says_why(on, machine, name, missing):
    on(machine, name)
    chosen = choose_backend()
    assert chosen.name == name
    assert f"{missing} is not installed" in chosen.reason


def test_nothing_to_choose_from(on):
    on("Linux")
    with pytest.raises(
        InputError, match=r"neither mlx nor torch is installed; install it with: pip install 'mlxmoe\[mlx,torch\]'"
    ):
        choose_backend()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_a_request_is_granted_on_any_machine(on, machine, name):
    on(machine, "mlx", "torch")
    assert choose_backend(name).name == name


@pytest.mark.parametrize(("name", "other"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_request_for_what_is_missing_is_refused(on, name, other):
    on("Linux", other)
    with pytest.raises(
        InputError, match=rf"{name} is not installed; install it with: pip install 'mlxmoe\[{name}\]', or take"
    ):
        choose_backend(name)


@pytest.mark.parametrize("name", ["jax", "MLX", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InputError, match=f"--backend '{name}': must be one of auto, mlx, torch"):
        choose_backend(name)


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_a_blocked_module_counts_as_missing(monkeypatch, name):
    assert is_installed(name)
    monkeypatch.delitem(backend.sys.modules, "mlx.core", raising=False)
    monkeypatch.setitem(backend.sys.modules, name, None)
    assert not is_installed(name)


@pytest.mark.parametrize(
    ("variable", "name", "reason"),
    [
        ("TORCHELASTIC_RUN_ID", "torch", "torch, as torchrun started it"),
        ("MLX_RANK", "mlx", "mlx, as mlx.launch started it"),
    ],
)
def test_a_launcher_has_chosen(on, monkeypatch, variable, name, reason):
    on("Mac", "mlx", "torch")
    monkeypatch.setenv(variable, "1")
    assert choose_backend().reason == reason
    assert choose_backend(name).name == name
    other = {"mlx": "torch", "torch": "mlx"}[name]
    with pytest.raises(InputError, match=f"--backend {other}: .* starts {name}; leave --backend out"):
        choose_backend(other)
