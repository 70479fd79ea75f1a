"""What a job would take, before it runs: memory by name, messages, time. From a config alone; no MPI, no weights."""
