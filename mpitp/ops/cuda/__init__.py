"""The CuPy twins of the operations: what the NumPy beside them says, in as few kernels as memory traffic asks for.

Every sum has one order that depends on shapes alone: no atomics, so the same bits in every run.
"""
