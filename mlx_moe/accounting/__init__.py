"""Arithmetic on a config: parameters, FLOPs, memory, machines. Imports no framework."""

from mlx_moe.accounting.parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "count_parameters"]
