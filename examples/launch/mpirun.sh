#!/bin/sh
# On one of the hosts: HOSTS=first-host:2,second-host:2 sh examples/launch/mpirun.sh
# The words are Open MPI's. `mpi4py` has to be installed, for the same MPI: by it Lightning hears who each process is.
# mpirun ends all processes when one of them is killed.
mpirun -np 4 --host "$HOSTS" --map-by ppr:2:node:PE=4 --bind-to core -x OMP_NUM_THREADS=4 \
    python examples/launch/train.py --nodes 2 --devices 2 --out "${OUT:-run}"
