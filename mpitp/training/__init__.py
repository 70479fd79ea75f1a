"""Training over ranks: optimizer, data, the loop. The same bytes from any number of ranks in reproducible mode."""
