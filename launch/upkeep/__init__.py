"""What the owner of runs and models does between runs: look at them, clear what is no longer needed, upload a model."""
