"""The kernels of mpitp/ops/cuda without a GPU: what they are called with, and whether they compile."""
import sys

import nvrtc
import pytest
from spmd import SUPPORT, job


@pytest.mark.launcher
def test_kernels_are_called_with_what_they_take():
    """As many arguments as parameters, each of its dtype; every kernel, in every dtype."""
    done = job(1, SUPPORT / "kernels_job.py", "arguments")
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 1000, done.stdout + done.stderr


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.skipif(nvrtc.library_path() is None, reason="no NVRTC, which compiles kernels without a GPU: "
                                                         "pip install nvidia-cuda-nvrtc-cu12")
def test_every_kernel_compiles():
    """In every dtype and with every option, for compute capability 9.0 and, where the source differs, for 7.5."""
    done = job(1, SUPPORT / "kernels_job.py", "compile", timeout=900,
               environment={"PYTHONPATH": ":".join(filter(None, sys.path))})
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 100, done.stdout + done.stderr


def test_nvrtc_says_what_is_wrong():
    if nvrtc.library_path() is None:
        pytest.skip("no NVRTC, which compiles kernels without a GPU: pip install nvidia-cuda-nvrtc-cu12")
    compiler = nvrtc.Compiler()
    compiler.compile('extern "C" __global__ void good(float* x) { x[0] = 1; }', ("--gpu-architecture=sm_90",))
    with pytest.raises(SyntaxError, match=r'identifier "y" is undefined'):
        compiler.compile('extern "C" __global__ void bad(float* x) { x[0] = y; }', ("--gpu-architecture=sm_90",))
