"""The same model on one process, in the plainest form: what everything else is judged by. Shares no code with it."""
