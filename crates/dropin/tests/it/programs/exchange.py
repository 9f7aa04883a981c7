"""Two ranks or more exchange numpy arrays that come and go, and check every byte.

exchange.py SECONDS: prints "N rounds, M bytes wrong" on rank 0; exits 1 if a byte was wrong.
"""
import sys
import time

import numpy
from mpi4py import MPI

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
end = time.monotonic() + float(sys.argv[1])
rounds = wrong = 0
going = True
while going:
    length = 1 << (8 + rounds % 14)
    sent = numpy.full(length, (rank * 17 + rounds) % 251, dtype=numpy.uint8)
    got = numpy.zeros(length, dtype=numpy.uint8)
    last = (rank - 1) % size
    world.Sendrecv(sent, dest=(rank + 1) % size, recvbuf=got, source=last)
    wrong += int((got != (last * 17 + rounds) % 251).sum())
    del sent, got
    rounds += 1
    going = world.bcast(time.monotonic() < end)
wrong = world.reduce(wrong)
if rank == 0:
    print(f"{rounds} rounds, {wrong} bytes wrong")
sys.exit(world.bcast(wrong) != 0)
