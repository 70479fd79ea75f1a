"""Transport: GPUs of one node that write into each other's memory, by kernels of this project; and another one beyond.

Which of them carries an array depends on its bytes alone. Calls are put on CuPy's current stream, as NCCL's are, and a
CUDA graph can hold them.
"""
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ...arrays import Array, DeviceArray
from ...sharding.partition import Partition, ranges
from ..ledger import Collective, dtype_name
from ..sums import Sum
from ..tree import TreeSum, nodes_of_ranks, root_width
from .mpi_device import runs
from .peer_kernels import Order, order_of_ranks, order_of_tree, shares_blocks, slots
from .peer_memory import EIGHT_BYTES, Peers

WORDS_BYTES = 1 << 20           # of what a rank sends to all others in words, up to which that is the fastest
GATHER_BYTES = 1 << 19          # of the gathered array
BESIDE_BLOCKS = 32              # of threads, of a sum in shares that leaves room for what the device computes meanwhile
IN_SHARES = ("float32", "float16", "bfloat16")      # results whose float32 summands may be added up in shares


class PeerTransport:
    """MpiTransport's methods, and sums that are rounded to 16 bits or follow the tree of reproducible mode.

    Parameters
    ----------
    peers : Peers
        What the ranks share.
    beyond : transport
        What carries the rest: many bytes that are only moved, or sums of many float64.
    how : str
        Why it is this transport that a group has.
    """
    name = "peer"
    message_bytes = 1 << 62
    sums: tuple[type[Sum], type[Sum]]

    def __init__(self, peers: Peers, beyond: Any, how: str) -> None:
        self.peers, self.beyond, self.how = peers, beyond, how
        self.rank, self.size = peers.rank, peers.size
        self.overlaps, self.records = beyond.overlaps, beyond.records
        self.orders = {op: order_of_ranks(self.size, op) for op in ("sum", "max", "min")}
        self.side_stream: Any = None    # of sums that are under way while the device computes

    def kernel_for(self, y: DeviceArray, order: Order) -> str:
        """Return the kernel that adds up to y, by its bytes alone; "" for none, where `beyond` carries."""
        name, most = dtype_name(y.dtype), max(order.counts)
        if sum(order.counts) > slots(self.size) or not most:
            return ""
        summand_bytes = y.size * (8 if name in EIGHT_BYTES else 4)
        if summand_bytes * most * (self.size - 1) <= WORDS_BYTES:
            return "sum_words"
        return "sum_shares" if name in IN_SHARES else ""

    def add_up(self, summands: list[DeviceArray], y: DeviceArray, order: Order, beside: bool = False) -> bool:
        """y = the total of everybody's summands, in this order. Returns False, with nothing done, for too many bytes.

        beside : whether the device computes meanwhile
        """
        kernel = self.kernel_for(y, order)
        if kernel == "sum_shares":
            self.peers.sum_shares(summands, y, order, BESIDE_BLOCKS if beside else shares_blocks(y.size))
        elif kernel and y.size:
            self.peers.sum_words(summands, y, order)
        return kernel != ""

    def all_reduce(self, x: DeviceArray, op: str) -> None:
        """x becomes the sum (max, min) over the ranks, in place."""
        if not self.add_up([x], x, self.orders[op]):
            self.beyond.all_reduce(x, op)

    def begin_all_reduce(self, x: DeviceArray, op: str) -> Callable[[], None]:
        """Start all_reduce(x, op) on a stream of its own; returns a function after which the current one may use x."""
        return self.begin([x], x, self.orders[op]) or self.beyond.begin_all_reduce(x, op)

    def begin(self, summands: list[DeviceArray], y: DeviceArray, order: Order) -> Callable[[], None] | None:
        """Start add_up(); returns a function after which the current stream may use y, None for too many bytes."""
        cuda = self.peers.cupy.cuda
        if self.side_stream is None:
            self.side_stream = cuda.Stream(non_blocking=True)
        current = cuda.get_current_stream()
        self.peers.wait_for_others()
        self.side_stream.wait_event(current.record())
        with self.side_stream:
            done = self.add_up(summands, y, order, beside=True)
        if not done:
            return None
        self.peers.under_way = end = self.side_stream.record()
        return partial(self.wait_for, end)

    def wait_for(self, end: Any) -> None:
        """Let the current stream wait for the end of a sum."""
        self.peers.cupy.cuda.get_current_stream().wait_event(end)
        if self.peers.under_way is end:
            self.peers.under_way = None

    def all_gather(self, send: DeviceArray, receive: DeviceArray, counts: list[int]) -> None:
        """receive = the send arrays of all ranks, one after the other."""
        if receive.nbytes <= GATHER_BYTES:
            self.peers.gather_words(send, receive, counts, (1 << self.size) - 1)
        else:
            self.beyond.all_gather(send, receive, counts)

    def gather(self, send: DeviceArray, receive: DeviceArray | None, counts: list[int], root: int) -> None:
        """receive on root = the send arrays of all ranks, one after the other; receive is None elsewhere."""
        if sum(counts) * send.itemsize <= GATHER_BYTES:
            self.peers.gather_words(send, receive, counts, 1 << root)
        else:
            self.beyond.gather(send, receive, counts, root)

    def broadcast(self, x: DeviceArray, root: int) -> None:
        """x becomes root's x, in place."""
        if x.nbytes <= GATHER_BYTES:
            counts = [x.size if rank == root else 0 for rank in range(self.size)]
            self.peers.gather_words(x, None if self.rank == root else x, counts, (1 << self.size) - 1)
        else:
            self.beyond.broadcast(x, root)

    def reduce_scatter(self, send: DeviceArray, receive: DeviceArray, counts: list[int], op: str) -> None:
        """receive = this rank's run of the sum (max, min) of the send arrays, cut by counts."""
        if send.nbytes * (self.size - 1) <= WORDS_BYTES:
            total = self.peers.cupy.empty_like(send)
            self.add_up([send], total, self.orders[op])
            receive[...] = runs(total, counts)[self.rank]
        else:
            self.beyond.reduce_scatter(send, receive, counts, op)

    def all_to_all(self, send: DeviceArray, send_counts: list[int], receive: DeviceArray,
                   receive_counts: list[int]) -> None:
        """Run p of send goes to rank p; receive = what every rank sent here, one after the other."""
        self.beyond.all_to_all(send, send_counts, receive, receive_counts)

    def close(self) -> None:
        """Wait for what is pending; what the ranks share stays for the next group of them."""
        self.peers.cupy.cuda.get_current_stream().synchronize()
        self.beyond.close()


class PeerSum(Sum):
    """Sum over transport `peer`: float32 summands of a 16-bit result travel once, and the result in its 16 bits."""

    def all_reduce(self) -> Array:
        """Return the sum, on every rank. Collective: (P-1)/P (bytes of the summands + bytes of the result) a rank."""
        group, total = self.group, self.total
        if total is None or total.dtype != self.summand_dtype or total.dtype == self.dtype:
            return super().all_reduce()
        y, carrier = group.xp.ndarray(self.shape, self.dtype), group.transport
        with group.ledger.record_data(Collective("all_reduce", y.size, dtype_name(self.dtype)),
                                      (total.nbytes + y.nbytes) * (group.size - 1) // group.size):
            if self.waiting:
                finish = carrier.begin([total], y, carrier.orders["sum"])
                while self.waiting:
                    function, arguments = self.waiting.popleft()
                    function(*arguments)
                finish()
            else:
                carrier.add_up([total], y, carrier.orders["sum"])
        return y


class PeerTreeSum(TreeSum):
    """This TreeSum goes over transport `peer`: a kernel adds up every rank's nodes in the tree's order, and rounds."""

    def all_reduce(self) -> Array:
        """Return the sum, on every rank, with the bits of any other transport. Collective: see peer_bytes."""
        group, order = self.group, order_of(self.partition)
        y, nodes = group.xp.ndarray(self.shape, self.dtype), nodes_of_ranks(self.partition)[group.rank]
        if not group.transport.kernel_for(y, order):
            return super().all_reduce()
        with group.ledger.record_data(Collective("all_reduce", y.size, dtype_name(self.dtype)),
                                      peer_bytes(self.partition, group.rank, y.size, self.summand_dtype.itemsize,
                                                 y.itemsize)):
            group.transport.add_up([self.fold.known[node] for node in nodes], y, order)
        return y


PeerTransport.sums = PeerSum, PeerTreeSum       # what a group adds up with, in ordinary and in reproducible mode


@cache
def order_of(partition: Partition) -> Order:
    """Return the order of the tree over the blocks of a partition."""
    return order_of_tree(nodes_of_ranks(partition), root_width(partition.blocks))


def peer_bytes(partition: Partition, rank: int, elements: int, summand_bytes: int, result_bytes: int) -> int:
    """Return the bytes that a rank sends of a sum: its nodes to the rank that adds up a share, its share to all."""
    chunk = ranges(elements, partition.ranks)
    own = chunk[rank + 1] - chunk[rank]
    folded = len(nodes_of_ranks(partition)[rank])
    return summand_bytes * folded * (elements - own) + result_bytes * (partition.ranks - 1) * own
