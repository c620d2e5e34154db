#!/bin/sh
# On each of the nodes, with its number: NODE_RANK=0 MASTER_ADDR=first-host sh examples/launch/static.sh
# All nodes must be there, and none comes back: the simplest, for a fixed set of hosts.
torchrun --nnodes=2 --nproc-per-node=2 --node-rank="$NODE_RANK" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    examples/launch/train.py --nodes 2 --devices 2 --out "${OUT:-run}"
