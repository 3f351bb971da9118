"""Analysis of runs: evaluation, sweeps, scaling laws, comparison, experts, plots and the report."""
