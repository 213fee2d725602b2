"""One command that starts a training run on this machine, under SLURM, on GKE or on TPU VMs."""
