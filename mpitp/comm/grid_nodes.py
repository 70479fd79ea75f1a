"""Which node each rank is on, and an order of the ranks in which tensor groups are inside of nodes.

    8 ranks, 2 nodes, dealt one to each node in turns        node a: 0 2 4 6      node b: 1 3 5 7
    tensor groups of 2 in the launcher's order               (0 1) (2 3) (4 5) (6 7)      each on two nodes
    tensor groups of 2 by node                               (0 2) (1 3) (4 6) (5 7)      each on one
"""
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI


def node_of_this_rank(comm: Any) -> int:
    """Return a number of this rank's node: the lowest rank of `comm` that shares its memory. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    first: int = node.bcast(comm.rank)
    node.Free()
    return first


def nodes_of(comm: Any) -> list[int]:
    """Return the number of each rank's node. Collective."""
    return comm.allgather(node_of_this_rank(comm))


def order_by_node(nodes: Sequence[int], tensor: int) -> list[int]:
    """Return the ranks in an order of whose runs of `tensor` ranks as many as can be are on one node.

    The launcher's order stays where it has as many; rank 0 stays the first. What is left of nodes whose ranks are no
    multiple of `tensor` makes groups over nodes.

    nodes : the number of each rank's node
    """
    of_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        of_node.setdefault(node, []).append(rank)
    inside, left = [], []
    for ranks in of_node.values():
        whole = len(ranks) - len(ranks) % tensor
        inside += groups_of(ranks[:whole], tensor)
        left += ranks[whole:]
    launched = list(range(len(nodes)))
    if sum(len({nodes[rank] for rank in group}) == 1 for group in groups_of(launched, tensor)) == len(inside):
        return launched
    return [rank for group in sorted(inside + groups_of(left, tensor)) for rank in group]


def groups_of(ranks: list[int], size: int) -> list[list[int]]:
    """Return runs of so many ranks."""
    return [ranks[at:at + size] for at in range(0, len(ranks), size)]
