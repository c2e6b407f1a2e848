"""Teachers that give a few probabilities per token: caches of what a teacher said, and teachers behind a server."""
