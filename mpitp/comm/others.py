"""What a rank knows of the ranks that it may wait for: their records, who is silent how long, and what to say of it."""
from typing import Any

from .heartbeats import Heartbeats
from .mail import Mail
from .stand import clock, is_there, state

LEFT = 2.0          # seconds without a new record that make a rank silent; and how long one waits for one that has left
LATE = 3            # rounds more for ranks of other hosts: theirs, the mail's, and this rank's


class Others:
    """The other ranks of a watch.

    Parameters
    ----------
    beats : Heartbeats
    mail : Mail or None
        Between the hosts. None: there is one host, or those of others are not seen.

    Attributes
    ----------
    records : {int: dict}
        The last one of each rank that is seen.
    silent : {int: float}
        Seconds since it changed.
    """

    def __init__(self, beats: Heartbeats, mail: Mail | None):
        self.beats, self.mail = beats, mail
        self.rank, self.size = beats.rank, len(beats.hosts)
        self.records: dict[int, dict] = {}
        self.silent: dict[int, float] = {}
        self.heard: dict[int, str] = {}             # the time of day of the last new record
        self.visible: set[int] = set()              # whose processes this rank sees: not those of other containers
        self.silence_elsewhere = LEFT
        for rank in set(range(self.size)) - set(beats.here) if mail else ():
            self.records[rank] = {"round": -1, "process": beats.processes[rank], "open": {"0": (0, None)}, "closed": {},
                                  "leaving": False, "place": "its start", "waits": False, "since": clock(),
                                  "call": None}
            self.silent[rank], self.heard[rank] = 0.0, clock()

    def read(self, seconds: float) -> None:
        """Read where the other ranks stand; seconds: since the last time."""
        self.silence_elsewhere = LEFT + LATE * seconds * (self.mail.rounds if self.mail else 1)
        for rank in range(self.size):
            record = self.beats.read(rank) if rank != self.rank else None
            before = self.records.get(rank)
            if record is None and (before is None or rank in self.beats.here):
                continue                            # not yet; or it is being written
            record = record or before or {}
            if before is None and is_there(record["process"]):
                self.visible.add(rank)
            # A rank without open groups sends no mail.
            is_fresh = record["leaving"] or not record["open"] or before is None or record["round"] != before["round"]
            self.silent[rank] = 0.0 if is_fresh else self.silent[rank] + seconds
            self.heard[rank] = clock() if is_fresh else self.heard[rank]
            self.records[rank] = record

    def is_silent(self, rank: int) -> bool:
        """Return whether a rank gives no sign of life."""
        return self.silent[rank] >= (LEFT if rank in self.beats.here else self.silence_elsewhere)

    def of_this_host(self, own: dict) -> dict[int, dict]:
        """Return the records of this host's ranks with what only this host can see of those that are silent."""
        others = {rank: record for rank, record in list(self.records.items()) if rank in self.beats.here}
        return {self.rank: own} | {rank: record | self.seen_here(rank) for rank, record in others.items()}

    def seen_here(self, rank: int) -> dict[str, Any]:
        """Return what the system says of a rank of this host that is silent."""
        process = self.records[rank]["process"]
        if not self.is_silent(rank):
            return {}
        return {"state": state(process), "ended": rank in self.visible and not is_there(process)}

    def carries_mail(self) -> bool:
        """Return whether this rank is the lowest one of its host that can send the mail."""
        return all(self.is_silent(rank) or record["leaving"] or not record["open"]
                   for rank, record in self.records.items() if rank < self.rank and rank in self.beats.here)

    # --- what is said -----------------------------------------------------------------------------------------------

    def lower_that_wait(self) -> int:
        """Return how many lower ranks wait, too: the lowest one speaks."""
        return sum(1 for rank, record in self.records.items()
                   if rank < self.rank and record["waits"] and not record["leaving"] and not self.is_silent(rank))

    def gone(self, number: str, count: int) -> list[str]:
        """Return the ranks that will never come to a collective, and why.

        Parameters
        ----------
        number : str
            Of the group; "" for none.
        count : int
            Its collectives that this rank has done.
        """
        said = []
        for rank, record in sorted(self.records.items()):
            if record["leaving"] and record["open"].get(number, [count + 1])[0] <= count:
                said.append(f"{self.name(rank)} has left the program at {record['since']}")
            elif record["closed"].get(number, count + 1) <= count:
                said.append(f"{self.name(rank)} has closed the group")
            elif self.has_ended(rank):
                said.append(f"{self.name(rank)} has ended without a word, last at {record['place']}")
        return said

    def has_ended(self, rank: int) -> bool:
        """Return whether the process of a rank is known to have ended."""
        seen = self.seen_here(rank) if rank in self.beats.here else self.records[rank]
        return seen.get("ended", False)

    def missing(self, number: str, count: int, name: str) -> list[str]:
        """Return the ranks that have not arrived where this one waits, and where they stand.

        Parameters
        ----------
        number, count
            As gone()'s.
        name : str
            Of the collective.
        """
        said = []
        for rank, record in sorted(self.records.items()):
            its_count, its_name = record["open"].get(number, (0, None))
            its_name = its_name or record["call"]
            if self.is_silent(rank):
                said.append(f"{self.name(rank)} has given no sign of life since {self.heard[rank]}{self.why(rank)}, "
                            f"last at {record['place']}")
            elif record["leaving"]:
                said.append(f"{self.name(rank)} has left the program at {record['since']}")
            elif (its_count, its_name) != (count, name):
                within = f"inside of {its_name}, " if its_name else ""
                said.append(f"{self.name(rank)} is {within}at {record['place']} since {record['since']}")
        unseen = [f"rank {rank} on {self.beats.hosts[rank]}" for rank in range(self.size)
                  if rank != self.rank and rank not in self.records]
        if not said and unseen:
            said = [f"one of {', '.join(unseen)}, or the network between the hosts (below MPI_THREAD_MULTIPLE the "
                    "watchdog sees no other host)"]
        return said or ["no rank: all are there, so that MPI or the network has lost something"]

    def why(self, rank: int) -> str:
        """Return what is known of why a rank is silent, in parentheses, or nothing."""
        record = self.records[rank]
        if rank in self.beats.here:
            return state(record["process"])
        its_host = next(ranks for ranks in self.beats.heads.values() if rank in ranks)
        if all(self.is_silent(other) for other in its_host):
            return f" (stopped, or {self.beats.hosts[rank]} or the network to it is down)"
        return record.get("state", "")

    def name(self, rank: int) -> str:
        """Return a rank with its host and process."""
        return f"rank {rank} of {self.size} on {self.beats.hosts[rank]} (process {self.records[rank]['process']})"
