"""The parallel layers: the dense operations, block by block, and what the ranks exchange between them."""
