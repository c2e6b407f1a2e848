"""How a recipe gets to its machines: this one, several under torchrun, Slurm, Kubernetes. Each target makes a command or a file."""
