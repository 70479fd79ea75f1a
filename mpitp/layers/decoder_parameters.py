"""The parameters of a decoder by its config alone: nothing of their size is made, and no MPI is asked.

For `inspect`, and for looking at a checkpoint before anything that its config describes is made.
"""
import numpy as np

from .decoder import Decoder
from ..sharding.partition import Partition


def decoder_parameters(config):
    """{name: ParameterSpec} of Decoder(group, config), for any group. Makes the replicated ones: norms, positions."""
    return Decoder(StandIn(), config, seed=None).specs


class StandIn:
    """In place of a group: the first of two ranks that share one block has nothing of whatever is split."""
    rank, size, blocks, device, xp = 0, 2, 1, "cpu", np

    def partition(self, size, unit=1, share=1):
        return Partition(size, self.size, self.blocks, unit, share)
