#!/usr/bin/env bash
# Train with DeepSpeed's own launcher in the place of torchrun, on this machine or on those of a hostfile.
#   launchers/deepspeed_launcher.sh [launcher options] -- CONFIG [a.b=c ...]
#   launchers/deepspeed_launcher.sh --num_gpus 8 -- configs/base_large.yaml engine.name=deepspeed
#   launchers/deepspeed_launcher.sh --hostfile hosts -- configs/base_large.yaml engine.name=deepspeed
# On a machine without GPUs --num_gpus is the number of processes. Logs of the launcher: --log_level info.
set -euo pipefail

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
if [[ $# -lt 2 ]]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
shift
# dmoe reads its rank from the environment, as torchrun sets it, and not from an argument.
exec deepspeed --no_local_rank --log_level warning ${options[@]+"${options[@]}"} --module dmoe.train "$@"
