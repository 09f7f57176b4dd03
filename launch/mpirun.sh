#!/usr/bin/env bash
# Starts `pikv` under mpirun; mpi4py tells the ranks where rank 0 listens. Arguments are passed on:
#
#   launch/mpirun.sh generate --config launch/configs/small_moe.yaml --expert-parallel 2 --prompt-file doc.txt
#
# From the environment:
#   PYTHON           interpreter, with mpi4py                       python3
#   MPIRUN           Open MPI's or MPICH's                          mpirun
#   NP               ranks in all                                   2
#   MPIRUN_ARGS      further options, divided at blanks, such as    none
#                    "--hostfile hosts --mca btl_tcp_if_include eth0" or "--allow-run-as-root --oversubscribe"
#   MASTER_ADDR      of rank 0's node                               rank 0 tells it
#   MASTER_PORT      free on rank 0's node                          rank 0 takes one
#   PIKV_BIND        auto: leaves what mpirun has bound, else       auto
#                    each rank its share of the CPUs; off
#   PIKV_TIMEOUT     seconds to wait for a rank that is silent      600; Open MPI hands it to other nodes by
#                                                                   MPIRUN_ARGS="-x PIKV_TIMEOUT"
set -euo pipefail
# shellcheck source=checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

: "${PYTHON:=python3}" "${MPIRUN:=mpirun}" "${NP:=2}" "${MPIRUN_ARGS:=}"
check_count NP
if [[ -n ${MASTER_PORT:-} ]]; then
  check_port
fi
read -r -d '' -a options <<<"$MPIRUN_ARGS" || true # the end of the text, in place of a last delimiter

exec "$MPIRUN" -n "$NP" "${options[@]}" "$PYTHON" -m pikv_megatron "$@"
