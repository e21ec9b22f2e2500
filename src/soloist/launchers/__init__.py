"""Scripts and manifests that start the ranks of a plan: torchrun, Slurm, MPI, Kubernetes, this machine."""
