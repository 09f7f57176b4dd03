#!/usr/bin/env bash
# Starts `pikv` under the `deepspeed` launcher; arguments are passed on:
#
#   launch/deepspeed.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# From the environment:
#   PYTHON           interpreter                                    python3
#   NPROC_PER_NODE   ranks per node                                 2
#   HOSTFILE         DeepSpeed's, for several nodes by ssh          not set: this node alone
#   MASTER_ADDR      of node 0 (or DeepSpeed asks it by ssh)        127.0.0.1
#   MASTER_PORT      free on node 0                                 29500
#   BIND_CORES       1: DeepSpeed binds by numactl                  0: as PIKV_BIND says
#   PIKV_BIND        auto: each rank its share of the CPUs; off     auto
#   DS_ACCELERATOR   cpu, cuda                                      DeepSpeed's own choice
set -euo pipefail

: "${PYTHON:=python3}" "${NPROC_PER_NODE:=2}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${BIND_CORES:=0}"
options=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
if [[ -n ${HOSTFILE:-} ]]; then
  options+=(--hostfile "$HOSTFILE" --num_gpus "$NPROC_PER_NODE")
else
  options+=(--num_accelerators "$NPROC_PER_NODE")
fi
if [[ $BIND_CORES == 1 ]]; then
  options+=(--bind_cores_to_rank)
fi

exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --no_local_rank --module pikv_megatron "$@"
