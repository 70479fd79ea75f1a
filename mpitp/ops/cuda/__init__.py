"""The CuPy twins of the operations of mpitp/ops: the same functions, in as few kernels as memory traffic asks for.

Every sum has one order that depends on shapes alone: no atomics, so the same bits in every run.
"""
