#!/usr/bin/env bash
# Starts `pikv` under torchrun; arguments are passed on:
#
#   launch/torchrun.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# On several nodes run it once on each, with NNODES, NODE_RANK and MASTER_ADDR. From the environment:
#   PYTHON           interpreter                                    python3
#   NPROC_PER_NODE   ranks per node                                 2
#   NNODES           nodes                                          1: ranks meet at the loopback, on a port of torchrun's
#   NODE_RANK        of this node                                   0; needed where NNODES is above 1
#   MASTER_ADDR      of node 0, reachable from all                  needed where NNODES is above 1
#   MASTER_PORT      free on node 0                                 29500, where NNODES is above 1
#   OMP_NUM_THREADS  torch's threads per rank                       this node's CPUs / NPROC_PER_NODE
#   PIKV_BIND        auto: each rank its share of the CPUs; off     auto
#   PIKV_TIMEOUT     seconds to wait for a rank that is silent      600
set -euo pipefail
# shellcheck source=checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

: "${PYTHON:=python3}" "${NPROC_PER_NODE:=2}" "${NNODES:=1}" "${MASTER_PORT:=29500}"
check_count NPROC_PER_NODE NNODES
check_port
if ((NNODES > 1)); then
  : "${NODE_RANK:?expected the rank of this node, since NNODES is $NNODES}"
  : "${MASTER_ADDR:?expected the address of node 0, since NNODES is $NNODES}"
fi
: "${NODE_RANK:=0}"
if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((NODE_RANK >= NNODES)); then
  refuse "NODE_RANK: expected a whole number below NNODES, $NNODES, got '$NODE_RANK'"
fi
if ((NNODES > 1)); then
  if ((NODE_RANK == 0)); then
    check_port_free
  fi
  options=(--rdzv-backend=static --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
else
  # torchrun's own store would listen at all of this machine's addresses. Here it meets by a file, and rank 0 has the store.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  options=(--rdzv-backend=c10d --rdzv-conf=store_type=file --rdzv-endpoint="$(mktemp)" --local-addr=127.0.0.1)
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cpus=$(nproc)
  OMP_NUM_THREADS=$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))
fi
export OMP_NUM_THREADS

exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" "${options[@]}" \
  -m pikv_megatron "$@"
