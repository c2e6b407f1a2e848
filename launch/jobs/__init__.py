"""Launch targets of a recipe: this machine, several under torchrun, Slurm, Kubernetes. Each target makes a command or a file."""
