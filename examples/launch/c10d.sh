#!/bin/sh
# The same line on each of the nodes: RENDEZVOUS=first-host:29400 sh examples/launch/c10d.sh
# torchrun deals out the numbers. --max-restarts=0: a rank that dies is this package's business, not torchrun's.
torchrun --nnodes=2 --nproc-per-node=2 --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RUN_ID:-line}" \
    examples/launch/train.py --nodes 2 --devices 2 --out "${OUT:-run}"
