"""The ranks that share a layer, and everything that calls MPI. Nothing outside this folder does."""
