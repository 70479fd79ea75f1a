"""The options that say where and how to compute, and the group that they ask for."""
from ..comm.group import TensorParallelGroup
from ..comm.mpi import TRANSPORTS

DTYPES = "float32 (the default), float64; on a GPU float16 and bfloat16 too"


def add_arguments(parser):
    parser.add_argument("--device", default="cpu", help="cpu (NumPy, the default) or gpu (CuPy)")
    parser.add_argument("--transport", default="auto", help=f"between GPUs: {', '.join(TRANSPORTS)} (auto)")
    parser.add_argument("--share-gpu", action="store_true", help="several ranks may have one GPU")
    parser.add_argument("--tf32", action="store_true", help="products of float32 on the GPU in TF32")


def group_of(arguments, **more):
    """The TensorParallelGroup that the options ask for. Collective."""
    return TensorParallelGroup(device=arguments.device, transport=arguments.transport, share_gpu=arguments.share_gpu,
                               tf32=arguments.tf32, **more)
