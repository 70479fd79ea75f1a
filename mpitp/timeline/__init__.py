"""When each rank did what: spans of layers, operations and collectives on one clock, and who waited for whom."""
