"""What becomes of runs: evaluation, sweeps, scaling laws and comparison; experts, plots and the report."""
