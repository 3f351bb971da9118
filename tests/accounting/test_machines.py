import pytest

from mlx_moe.accounting.machines import MACHINES, choose_machine, lookup
from mlx_moe.errors import InputError

REPORTED = {
    "Apple M1": "Apple M1",
    "Apple M3 Max": "Apple M3 Max",
    "Apple M4 Pro": "Apple M4 Pro",
    "NVIDIA H100 80GB HBM3": "NVIDIA H100",
    "NVIDIA H100 PCIe": "NVIDIA H100 PCIe",
    "NVIDIA A100-SXM4-80GB": "NVIDIA A100",
    "NVIDIA GeForce RTX 4090": "NVIDIA GeForce RTX 4090",
    "Tesla T4": "NVIDIA T4",
    "Tesla V100-SXM2-16GB": "NVIDIA V100",
    "NVIDIA L40S": "NVIDIA L40S",
}


@pytest.mark.parametrize("reported", REPORTED)
def test_lookup_by_the_reported_name(reported):
    machine = lookup(reported)
    assert machine is not None
    assert machine.name == REPORTED[reported]


@pytest.mark.parametrize(
    "reported", ["x86_64 CPU", "Apple M99", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"]
)
def test_other_names_are_not_known(reported):
    assert lookup(reported) is None


@pytest.mark.parametrize(
    ("text", "name", "memory_gb"),
    [
        ("M2 Max 32GB", "Apple M2 Max", 32),
        ("m1 pro 16 gb", "Apple M1 Pro", 16),
        ("Apple M4", "Apple M4", 16),
        ("4090", "NVIDIA GeForce RTX 4090", 24),
        ("NVIDIA A100 80GB", "NVIDIA A100", 80),
    ],
)
def test_choice_by_name_and_memory(text, name, memory_gb):
    machine, gb = choose_machine(text)
    assert (machine.name, gb) == (name, memory_gb)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("M2 Max 33GB", "32, 64, 96 GB"),
        ("M2 Maxx", "did you mean 'M2 Max'"),
        ("cray", "known: M1, "),
        ("", "known: M1, "),
    ],
)
def test_what_is_not_sold(text, said):
    with pytest.raises(InputError, match=said):
        choose_machine(text)


def test_every_machine_is_found_by_its_own_name():
    for machine in MACHINES:
        assert lookup(machine.name) is machine
        assert choose_machine(f"{machine.name} {machine.memory[-1]}GB") == (machine, machine.memory[-1])


def test_figures_hang_together():
    for machine in MACHINES:
        assert machine.fp16 >= machine.fp32 > 0
        assert machine.flops_per_s("bf16") in (machine.fp32 * 1e12, machine.fp16 * 1e12)
        assert list(machine.memory) == sorted(machine.memory)
        assert 0 < machine.usable_bytes(machine.memory[0]) < machine.memory[0] * 2**30
