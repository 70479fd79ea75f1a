"""What the benchmarks share: torch's f and g over gloo, one process with all cores, and how results are written.

Import before NumPy: it gives BLAS its share of the cores.
"""
import json
import os
import platform
import sys
import tempfile
import time

from mpi4py import MPI

from mpitp.comm import launch

CORES = launch.cores()
SHARE = launch.set_blas_threads(MPI.COMM_WORLD)     # before NumPy
launch.keep_freed_memory()                          # as python -m mpitp does; for torch's arrays as well

import torch                                        # noqa: E402
import torch.distributed as distributed             # noqa: E402
from threadpoolctl import ThreadpoolController      # noqa: E402

from mpitp import measure, tables           # noqa: E402

LIBRARIES = ThreadpoolController()                  # looked for once: each search takes half a millisecond


class gloo:
    """torch.distributed over gloo for the ranks of a group, as a context manager."""

    def __init__(self, group):
        store = group.comm.bcast(tempfile.mktemp() if group.rank == 0 else None)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=group.rank, world_size=group.size)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        distributed.destroy_process_group()


def blas_threads(count):
    """So many threads for BLAS, as a context manager."""
    return LIBRARIES.limit(limits=count, user_api="blas")


def alone(comm, cases):
    """The cases on rank 0 with all cores of its node; the other ranks sleep, where MPI would spin."""
    def on_rank_0(function):
        def call():
            if comm.rank == 0:
                with blas_threads(len(CORES)):
                    torch.set_num_threads(len(CORES))
                    function()
                    torch.set_num_threads(SHARE)
            request = comm.Ibarrier()
            while not request.Test():
                time.sleep(2e-4)
        return call
    return {name: on_rank_0(function) for name, function in cases.items()}


def pause():
    """A case to put behind dense ones: waiting threads of torch and BLAS spin on for 8 to 17 ms (measured)."""
    time.sleep(0.03)


def summary(schema, seconds, kinds, group, rounds, base="torch gloo", **sizes):
    """Medians, spread and ratios of every row.

    seconds : {"who kind": [seconds of each round]}; the row "BASE kind" is the one to compare with
    kinds : {kind: the name of the row that is its limit}
    """
    rows, over_this = {}, base.replace(" ", "_") + "_over_this"
    for kind, limit in kinds.items():
        for name, times in seconds.items():
            if name.endswith(f" {kind}") or name == limit:
                timing = measure.timing(times)
                rows[name] = dict(kind=kind, median_seconds=timing.median, least_seconds=timing.least,
                                  most_seconds=timing.most, over_limit=measure.ratio(times, seconds[limit]),
                                  **{over_this: measure.ratio(seconds[f"{base} {kind}"], times)})
                if name.startswith("reproducible"):
                    rows[name]["over_ordinary"] = measure.ratio(times, seconds[f"mpitp {kind}"])
    return {"schema": schema, "base": base, "command": f"mpirun -n {group.size} python {' '.join(sys.argv)}",
            "ranks": group.size, "cores_per_rank": SHARE, **sizes, "dtype": "float32", "rounds": rounds,
            "machine": launch.machine(), "mpi": launch.library_name(), "torch": torch.__version__,
            "python": platform.python_version(), "rows": rows}


def show(found, title, limit="limit"):
    print(f"{found['command']}\n{found['machine']}, {found['mpi']}, torch {found['torch']}, Python {found['python']}")
    print(f"{title}, {found['ranks']} ranks of {found['cores_per_rank']} core(s), medians of {found['rounds']} "
          f"interleaved rounds")
    base = found["base"]
    over_this = base.replace(" ", "_") + "_over_this"
    print("\n".join(tables.table(
        ("", "median", "fastest", "slowest", f"over {limit}", f"{base} over this"),
        [(name, *(tables.seconds(row[f"{which}_seconds"]) for which in ("median", "least", "most")),
          f"{row['over_limit']:.3f}", f"{row[over_this]:.2f}") for name, row in found["rows"].items()])))
    for name, row in found["rows"].items():
        if "over_ordinary" in row:
            print(f"  {name} over mpitp: {row['over_ordinary']:.3f}")


def save(found, folder, name, title, kinds):
    """FOLDER/NAME.json and .png."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as out:
        json.dump(found, out, indent=1)
        out.write("\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.4 * len(kinds), 3.6), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        rows = {name: row for name, row in found["rows"].items() if row["kind"] == kind}
        names = [name.removesuffix(f" {kind}") for name in rows]
        times = [row["median_seconds"] * 1e3 for row in rows.values()]
        colors = ["0.6" if name in ("products", "read") else "C0" if name in ("mpitp", "reproducible") else "C1"
                  for name in names]
        bars = axis.barh(names[::-1], times[::-1], color=colors[::-1])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(xlabel="milliseconds (median; shorter is better)", title=kind, xlim=(0, max(times) * 1.15))
    figure.suptitle(f"{title}, float32, {found['ranks']} ranks: {found['machine']}", fontsize=9)
    figure.savefig(os.path.join(folder, f"{name}.png"), dpi=110)
