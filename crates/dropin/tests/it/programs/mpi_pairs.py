"""Runs mpi_speed.c as shipped and with the drop-in in turn, and prints for each figure the median of
the pairs' ratios, the ratio of the minima, and the median of the times as shipped.

mpi_pairs.py TRANSPORT PROGRAM DROP-IN SECONDS [MMUN]: TRANSPORT is ob1, ucx, ofi or mpich. If MMUN is
"off", both runs of a pair are as shipped: that shows the scatter of the machine.
"""

import statistics
import subprocess
import sys
import time

OPEN_MPI = "mpirun.openmpi --allow-run-as-root --bind-to core -n 2 --mca pml "
COMMANDS = {
    "ob1": OPEN_MPI + "ob1",
    "ucx": OPEN_MPI + "ucx --mca opal_common_ucx_tls any --mca opal_common_ucx_devices any",
    "ofi": OPEN_MPI + "cm --mca mtl ofi",
    "mpich": "mpirun.mpich -bind-to core -n 2",
}

transport, program, drop_in, seconds = sys.argv[1:5]
source = sys.argv[5] if len(sys.argv) > 5 else "both"


def run(is_served):
    command = COMMANDS[transport].split()
    if is_served and source != "off":
        for name, value in ("LD_PRELOAD", drop_in), ("MMUN", source):
            command += ["-env", name, value] if transport == "mpich" else ["-x", f"{name}={value}"]
    output = subprocess.run(command + [program], capture_output=True, text=True, check=True).stdout
    times = {}
    for size, _, latency, _, rate in map(str.split, output.splitlines()):
        times[f"{size} bytes, latency"] = float(latency)
        times[f"{size} bytes, of a window"] = int(size) / float(rate)
    return times


pairs = []
begin = time.monotonic()
while time.monotonic() - begin < float(seconds):
    order = [False, True] if len(pairs) % 2 else [True, False]
    done = {is_served: run(is_served) for is_served in order}
    pairs.append((done[False], done[True]))
print(f"{transport}: {len(pairs)} pairs")
for name in pairs[0][0]:
    shipped = [pair[0][name] for pair in pairs]
    served = [pair[1][name] for pair in pairs]
    ratio = statistics.median(b / a for a, b in zip(shipped, served))
    least = min(served) / min(shipped)
    print(f"  {name:26} median {ratio:.3f}  minima {least:.3f}  {statistics.median(shipped):.3f} us")
