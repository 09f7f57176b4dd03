#!/usr/bin/env bash
# Starts `pikv` under the `deepspeed` launcher; arguments are passed on:
#
#   launch/deepspeed.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# From the environment:
#   PYTHON           interpreter                                    python3
#   NPROC_PER_NODE   ranks per node                                 2
#   HOSTFILE         DeepSpeed's, for several nodes by ssh          not set: this node alone
#   MASTER_ADDR      of node 0                                      127.0.0.1; with HOSTFILE DeepSpeed asks by ssh
#   MASTER_PORT      free on node 0                                 29500
#   BIND_CORES       1: DeepSpeed binds, and needs numactl          0: as PIKV_BIND says
#   PIKV_BIND        auto: each rank its share of the CPUs; off     auto
#   DS_ACCELERATOR   cpu, cuda                                      DeepSpeed's own choice
#   PIKV_TIMEOUT     seconds to wait for a rank that is silent      600; other nodes get it by ~/.deepspeed_env
set -euo pipefail
# shellcheck source=checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

: "${PYTHON:=python3}" "${NPROC_PER_NODE:=2}" "${MASTER_PORT:=29500}" "${BIND_CORES:=0}"
check_count NPROC_PER_NODE
check_port
options=(--master_port "$MASTER_PORT")
if [[ -n ${HOSTFILE:-} ]]; then
  # DeepSpeed would go on with this node alone.
  [[ -f $HOSTFILE ]] || refuse "HOSTFILE: expected DeepSpeed's list of hosts, there is no file '$HOSTFILE'"
  options+=(--hostfile "$HOSTFILE" --num_gpus "$NPROC_PER_NODE")
else
  : "${MASTER_ADDR:=127.0.0.1}"
  check_port_free
  options+=(--num_accelerators "$NPROC_PER_NODE")
fi
if [[ -n ${MASTER_ADDR:-} ]]; then
  options+=(--master_addr "$MASTER_ADDR")
fi
case $BIND_CORES in
  0) ;;
  1)
    command -v numactl >/dev/null || refuse "BIND_CORES: expected 0 where numactl is not installed, got 1"
    options+=(--bind_cores_to_rank)
    ;;
  *) refuse "BIND_CORES: expected 0 or 1, got '$BIND_CORES'" ;;
esac

exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --no_local_rank --module pikv_megatron "$@"
