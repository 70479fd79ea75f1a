"""Generation: keys and values, sampling, recorded tokens."""
