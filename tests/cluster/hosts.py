"""Print the host of each rank."""
import socket

from mpi4py import MPI

names = MPI.COMM_WORLD.gather(socket.gethostname())
if MPI.COMM_WORLD.rank == 0:
    print(*names)
