#!/usr/bin/env bash
# Starts `pikv` under torchrun; arguments are passed on:
#
#   launch/torchrun.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# On several nodes run it once on each, with NNODES, NODE_RANK and MASTER_ADDR. From the environment:
#   PYTHON           interpreter                                    python3
#   NPROC_PER_NODE   ranks per node                                 2
#   NNODES           nodes                                          1
#   NODE_RANK        of this node                                   0
#   MASTER_ADDR      of node 0, reachable from all                  127.0.0.1
#   MASTER_PORT      free on node 0                                 29500
#   OMP_NUM_THREADS  torch's threads per rank                       this node's CPUs / NPROC_PER_NODE
#   PIKV_BIND        auto: each rank its share of the CPUs; off     auto
set -euo pipefail

: "${PYTHON:=python3}" "${NPROC_PER_NODE:=2}" "${NNODES:=1}" "${NODE_RANK:=0}"
: "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cpus=$(nproc)
  OMP_NUM_THREADS=$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))
fi
export OMP_NUM_THREADS

exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" \
  --rdzv-backend=static --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  -m pikv_megatron "$@"
