# Untested: read by Python alone, never built by Spack. In a repository of your own, packages/py_mpitp/package.py (Spack
# before 1.0: packages/py-mpitp/package.py, and `from spack.package import *` alone):
#
#     spack repo create site-repo; cp package.py ...; spack repo add site-repo
#     spack dev-build --source-path CHECKOUT py-mpitp@0.2.0
from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import depends_on, license, variant, version


class PyMpitp(PythonPackage):
    """Tensor parallelism for transformers in plain NumPy (or CuPy) and MPI."""

    license("MIT", checked_by="mpitp")

    version("0.2.0")                    # from a checkout: spack dev-build

    variant("threads", default=True, description="one BLAS thread a rank in reproducible mode, set at run time")
    variant("text", default=False, description="prompts and texts beside token ids")
    variant("plot", default=False, description="plots of bench and train")
    variant("cuda", default=False, description="CuPy arrays on GPUs")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("mpi")
    depends_on("py-numpy@2:", type=("build", "run"))
    depends_on("py-mpi4py@4.1:", type=("build", "run"))
    depends_on("py-threadpoolctl", when="+threads", type=("build", "run"))
    depends_on("py-tokenizers", when="+text", type=("build", "run"))
    depends_on("py-matplotlib", when="+plot", type=("build", "run"))
    depends_on("py-cupy", when="+cuda", type=("build", "run"))
    depends_on("py-ml-dtypes", when="+cuda", type=("build", "run"))

    import_modules = ["mpitp", "mpitp.comm", "mpitp.layers", "mpitp.commands"]
