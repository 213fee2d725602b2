#!/usr/bin/env bash
# SLURM for tests/slurm from the packages of Debian or Ubuntu, if it is not there and may be installed. One line of output.
set -uo pipefail
if command -v slurmctld slurmd sbatch munged >/dev/null; then
  echo "SLURM: $(slurmctld -V), already installed"
elif ! command -v apt-get >/dev/null; then
  echo "SLURM: not installed, as there is no apt-get" && exit 1
elif [ "$(id -u)" != 0 ]; then
  echo "SLURM: not installed, as only root may: apt-get install slurm-wlm munge" && exit 1
else
  export DEBIAN_FRONTEND=noninteractive
  packages="slurmctld slurmd slurm-client munge"
  log=$(mktemp)
  # shellcheck disable=SC2086
  { apt-get install -y --no-install-recommends $packages || {
    apt-get update && apt-get install -y --no-install-recommends $packages; }; } >"$log" 2>&1 ||
    { echo "SLURM: apt-get install $packages failed: $(tail -n 1 "$log")" && exit 1; }
  echo "SLURM: $(slurmctld -V), installed"
fi
