#!/usr/bin/env bash
# The tutorial in one go: train, look, upcycle, grow, train on, write text, export. Minutes on a laptop's CPU, no network.
set -euo pipefail
steps=${MLXMOE_STEPS:+--steps $MLXMOE_STEPS}

mlxmoe train --preset llama --config examples/tour.yaml --phases 1 --out runs/tour $steps
mlxmoe report runs/tour
mlxmoe upcycle runs/tour tour-moe --experts 8 --top-k 2
mlxmoe grow tour-moe tour-large --d-model 160 --n-layers 5
mlxmoe train --from tour-large --phases 2 --config examples/tour-large.yaml --out runs/tour-large $steps
mlxmoe generate runs/tour-large --prompt "One day" -n 40
mlxmoe export runs/tour-large tour-export
