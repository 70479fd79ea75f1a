"""Transport of a group of one rank: nothing travels, and a plain MPI is handed no device pointer."""
from collections.abc import Callable

from ...arrays import DeviceArray


class OneRankTransport:
    """MpiTransport's methods where the sum over all ranks is this rank's own array.

    Parameters
    ----------
    name : str
        Of the transport that several ranks would use.
    how : str
        Why it is that one.
    """
    overlaps = False
    records = True
    message_bytes = 1 << 62

    def __init__(self, name: str, how: str) -> None:
        self.name, self.how = name, how

    def all_reduce(self, x: DeviceArray, op: str) -> None:
        """Leave x as it is."""

    def begin_all_reduce(self, x: DeviceArray, op: str) -> Callable[[], None]:
        """Leave x as it is, and return a function that does nothing."""
        return lambda: None

    def broadcast(self, x: DeviceArray, root: int) -> None:
        """Leave x as it is."""

    def all_gather(self, send: DeviceArray, receive: DeviceArray, counts: list[int]) -> None:
        """Copy send to receive."""
        receive[...] = send

    def gather(self, send: DeviceArray, receive: DeviceArray, counts: list[int], root: int) -> None:
        """Copy send to receive."""
        receive[...] = send

    def reduce_scatter(self, send: DeviceArray, receive: DeviceArray, counts: list[int], op: str) -> None:
        """Copy send to receive."""
        receive[...] = send

    def all_to_all(self, send: DeviceArray, send_counts: list[int], receive: DeviceArray,
                   receive_counts: list[int]) -> None:
        """Copy send to receive."""
        receive[...] = send

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""
