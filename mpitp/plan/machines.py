"""Machines by name, each with the source of its numbers. A rate is what a data sheet says times the share attained."""
from __future__ import annotations

from ..errors import InputError
from .machine import Link, Machine

DEFAULT = "laptop"
GIB = 1 << 30
# Share of a data sheet's rate that products and reads reach. CPU: OpenBLAS on one core of an EPYC. GPU, measured with
# CuPy on two H100s: 1,331 TF/s of the 1,979 of both in bfloat16 products.
OF_CPU, OF_GPU = 0.8, 0.67


def cpu(name: str, source: str, cores: int, memory_gib: int, core_flops: float, host_bytes_per_second: float,
        inside: Link, outside: Link | None) -> Machine:
    """Return a machine of CPUs with a rank on each core; core_flops: of float32 by the data sheet."""
    return Machine(name, source, "cpu", cores, memory_gib * GIB,
                   {"float32": OF_CPU * core_flops, "float64": OF_CPU * core_flops / 2},
                   OF_CPU * host_bytes_per_second / cores, min(10e9, OF_CPU * host_bytes_per_second / cores), 2e-6,
                   inside, outside)


def h100(name: str, source: str, gpus: int, link: Link, outside: Link | None) -> Machine:
    """Return a machine of H100 SXM GPUs, a rank on each.

    Data sheet of NVIDIA H100: 989 TF/s in bfloat16 and float16, 67 in float32, 80 GB at 3.35 TB/s.
    """
    flops = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 67e12}
    return Machine(name, source, "gpu", gpus, gpus * 80 * 10 ** 9, {key: OF_GPU * rate for key, rate in flops.items()},
                   OF_GPU * 3.35e12, OF_GPU * 3.35e12, 10e-6, link, outside)


MACHINES = {machine.name: machine for machine in (
    cpu("infiniband", "nodes of 2 AMD EPYC 7763 (data sheet: 64 cores of 2.45 GHz, 32 flops a cycle in "
        "float32), 512 GiB, 409.6 GB/s; one HDR link of 200 Gbit/s, 1.5 us (NVIDIA ConnectX-6 data sheet: below 1 us)",
        128, 512, 78.4e9, 409.6e9, Link(0.7e-6, 3e9), Link(1.5e-6, 25e9)),
    cpu("ethernet-10g", "nodes of 16 cores (AMD EPYC 7313P data sheet: 3.0 GHz, 204.8 GB/s), 128 GiB; 10 Gbit/s "
        "Ethernet, 25 us over TCP (netperf figures of common switches: 20 to 30)",
        16, 128, 96e9, 204.8e9, Link(0.7e-6, 5e9), Link(25e-6, 1.25e9)),
    h100("h100x8", "NVIDIA DGX H100 data sheet: NVLink 450 GB/s each way, 8 links of 400 Gbit/s to other nodes; NCCL "
         "27 us for a small all-reduce of 4 GPUs, measured", 8, Link(13e-6, 330e9), Link(20e-6, 320e9)),
    h100("h100x2", "NVIDIA H100 data sheet; all-reduce over NVLink measured: 18 us, 128 MiB in 0.50 ms", 2,
         Link(18e-6, 270e9), None),
    cpu("laptop", "AMD Ryzen 7 7840U data sheet: 8 cores, 3.3 GHz, 32 flops a cycle in float32, 2 channels of "
        "DDR5-5600 (89.6 GB/s); 32 GiB", 8, 32, 105.6e9, 89.6e9, Link(0.7e-6, 5e9), None))}


def machine_named(name: str) -> Machine:
    """Return the machine of this name. Raises InputError for one that is not in the table."""
    if name not in MACHINES:
        raise InputError(f"found machine {name!r}, expected a file that `bench --calibrate` wrote, or one of "
                         f"{', '.join(MACHINES)}")
    return MACHINES[name]
