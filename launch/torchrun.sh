#!/usr/bin/env bash
# Starts `pikv` under torchrun; arguments are passed on:
#
#   launch/torchrun.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# On several nodes run it once on each, with NNODES, NODE_RANK and MASTER_ADDR. From the environment:
#   PYTHON           interpreter                                    python3
#   NPROC_PER_NODE   ranks per node                                 2
#   NNODES           nodes                                          1
#   NODE_RANK        of this node                                   0; needed where NNODES is above 1
#   MASTER_ADDR      of node 0, reachable from all                  127.0.0.1; needed where NNODES is above 1
#   MASTER_PORT      free on node 0                                 29500
#   OMP_NUM_THREADS  torch's threads per rank                       this node's CPUs / NPROC_PER_NODE
#   PIKV_BIND        auto: each rank its share of the CPUs; off     auto
set -euo pipefail

: "${PYTHON:=python3}" "${NPROC_PER_NODE:=2}" "${NNODES:=1}" "${MASTER_PORT:=29500}"
for name in NPROC_PER_NODE NNODES; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "$name: expected a whole number of at least 1, got '${!name}'" >&2
    exit 2
  fi
done
if ((NNODES > 1)); then
  : "${NODE_RANK:?expected the rank of this node, since NNODES is $NNODES}"
  : "${MASTER_ADDR:?expected the address of node 0, since NNODES is $NNODES}"
fi
: "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}"
if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NNODES)); then
  echo "NODE_RANK: expected a whole number below NNODES, $NNODES, got '$NODE_RANK'" >&2
  exit 2
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cpus=$(nproc)
  OMP_NUM_THREADS=$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))
fi
export OMP_NUM_THREADS

exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" \
  --rdzv-backend=static --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  -m pikv_megatron "$@"
