"""The kernels of transport `peer` on the host: g++ compiles their source, and threads of the system run it.

So slots, ticks and the order of the additions are the real ones, on ranks that are real processes. A word is written in
two halves with a pause between, as nothing promises that it is not, and threads pause at random.
"""
import atexit
import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

COMPILER = shutil.which("g++")
ON_HOST = r"""
#define ON_HOST
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
struct Index { int x; };
static __thread Index threadIdx, blockIdx, gridDim, blockDim;
static __thread unsigned noise;
static int arrived, phase, stopped;
static void __syncthreads() {
    const int now = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == blockDim.x) {
        arrived = 0;
        __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
    } else
        while (__atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now && !stopped) sched_yield();
    if (stopped) pthread_exit(0);
}
static void pause_sometimes() {
    noise = noise * 1664525 + 1013904223;
    if ((noise >> 24) < 8) sched_yield();
}
struct alignas(16) Word { unsigned a, f, b, g; };
static unsigned long long joined(unsigned low, unsigned high) { return low | (unsigned long long)high << 32; }
static void put(Word* at, unsigned a, unsigned b, unsigned tick) {
    __atomic_store_n((unsigned long long*)at, joined(a, tick), __ATOMIC_RELEASE);
    pause_sometimes();
    __atomic_store_n((unsigned long long*)at + 1, joined(b, tick), __ATOMIC_RELEASE);
}
static Word get(const Word* at) {
    const unsigned long long one = __atomic_load_n((unsigned long long*)at, __ATOMIC_ACQUIRE);
    const unsigned long long other = __atomic_load_n((unsigned long long*)at + 1, __ATOMIC_ACQUIRE);
    return {(unsigned)one, (unsigned)(one >> 32), (unsigned)other, (unsigned)(other >> 32)};
}
static void tell(unsigned* flag, unsigned tick) { pause_sometimes(); __atomic_store_n(flag, tick, __ATOMIC_RELEASE); }
static unsigned look(const unsigned* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
static unsigned long long nanoseconds() {
    sched_yield();
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}
#define LOOKS 7
static void give_up(unsigned* error) { *error = 1; stopped = 1; pthread_exit(0); }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
"""
RUN = r"""
struct Start { int thread, block, blocks, threads; unsigned seed; void** arguments; };
static void* start(void* given) {
    const Start& s = *(Start*)given;
    threadIdx.x = s.thread, blockIdx.x = s.block, gridDim.x = s.blocks, blockDim.x = s.threads;
    noise = s.seed * 2654435761u + s.block * 97 + s.thread;
    void** arguments = s.arguments;
    KERNEL(ARGUMENTS);
    return 0;
}
extern "C" int run(int blocks, int threads, unsigned seed, void** arguments) {
    arrived = phase = stopped = 0;
    for (int block = 0; block < blocks && !stopped; block++) {      // each needs the others' of its number alone
        pthread_t running[1024];
        Start starts[1024];
        for (int thread = 0; thread < threads; thread++) {
            starts[thread] = {thread, block, blocks, threads, seed, arguments};
            if (pthread_create(&running[thread], 0, start, &starts[thread])) return -1;
        }
        for (int thread = 0; thread < threads; thread++) pthread_join(running[thread], 0);
    }
    return stopped;
}
"""
folder = tempfile.TemporaryDirectory(prefix="mpitp-kernels-")
calls = 0


class LaunchFailure(RuntimeError):
    """As CuPy's, after a kernel that gave up."""


class RawKernel:
    """In the place of cupy.RawKernel."""

    def __init__(self, code, name, options=()):
        self.code, self.name, self.function = code, name, None

    def compile(self):
        if self.function is None:
            types = parameter_types(self.code, self.name)
            arguments = ", ".join(f"*({kind}*)arguments[{k}]" for k, kind in enumerate(types))
            whole = ON_HOST + self.code + RUN.replace("KERNEL", self.name).replace("ARGUMENTS", arguments)
            path = Path(folder.name, hashlib.sha1(whole.encode()).hexdigest())
            if not path.with_suffix(".so").exists():
                path.with_suffix(".cpp").write_text(whole)
                subprocess.run([COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread",
                                "-ffp-contract=off", str(path.with_suffix(".cpp")), "-o",
                                str(path.with_suffix(".so"))], check=True)
            self.function, self.types = ctypes.CDLL(str(path.with_suffix(".so"))).run, types

    def __call__(self, grid, block, arguments):
        global calls
        self.compile()
        assert len(arguments) == len(self.types), (self.name, len(arguments), self.types)
        calls += 1
        held = [np.uint64(x.data.ptr) if hasattr(x, "data") and hasattr(x.data, "ptr") else x for x in arguments]
        for x, kind in zip(held, self.types):
            size = 8 if "*" in kind or "long long" in kind else 4
            assert isinstance(x, np.generic) and x.itemsize == size, (self.name, kind, x)
        held = [np.array(x) for x in held]
        pointers = (ctypes.c_void_p * len(held))(*(x.ctypes.data for x in held))
        if self.function(grid[0], block[0], os.getpid() * 31 + calls, pointers):
            raise LaunchFailure("unspecified launch failure")


def parameter_types(code, name):
    """The types of a kernel's parameters, with the macros of its source put in."""
    macros = dict(re.findall(r"^#define (\w+) (.*)$", code, re.M))
    text = re.search(rf"void (?:__launch_bounds__\([^)]*\) )?{name}\(([^)]*)\)", code).group(1)
    text = re.sub(r"\b[A-Z]+_PARAMETERS\b", lambda found: macros[found[0]], text)
    return [re.sub(r"\s*\w+$", "", " ".join(part.split())) for part in text.split(",")]


class Memory:
    """What CuPy's runtime has for memory of its own and IPC: shared memory of the system."""
    mapped: dict = {}

    @classmethod
    def malloc(cls, size):
        handle, path = tempfile.mkstemp(prefix="mpitp-gpu-", dir="/dev/shm")
        os.ftruncate(handle, size)
        os.close(handle)
        atexit.register(os.unlink, path)
        return cls.map(path)

    @classmethod
    def map(cls, path):
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        cls.mapped[address] = memory, path
        return address

    @classmethod
    def ipcGetMemHandle(cls, address):
        return cls.mapped[address][1].encode()

    @classmethod
    def ipcOpenMemHandle(cls, handle, flags):
        return cls.map(handle.decode())

    ipcCloseMemHandle = free = classmethod(lambda cls, address: None)

    @classmethod
    def memset(cls, address, value, size):
        ctypes.memset(address, value, size)

    @staticmethod
    def deviceSynchronize():
        pass
