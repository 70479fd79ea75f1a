"""What the GPU benchmarks share: the same memory for CuPy and torch, and what it means to be done."""
import cupy
import torch

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def as_torch(x):
    """A CuPy array as a tensor of the same memory."""
    if x.dtype.itemsize == 2:               # DLPack does not know ml_dtypes' bfloat16
        return torch.from_dlpack(x.view("int16")).view(TORCH[x.dtype.name])
    return torch.from_dlpack(x)


def draw(*shape, dtype, seed=0):
    """Standard normals on the device, the same on every rank."""
    return cupy.random.RandomState(seed).standard_normal(shape, dtype="float32").astype(dtype)


def randomise(layer, scale=1.0, seed=0):
    """Draw a layer's weights on the device, where that takes no time: others on each rank. Returns the layer.

    scale : of their standard deviation; 1.3 keeps activations of about 1 through many blocks without residuals
    """
    for number, (name, spec) in enumerate(layer.specs.items()):
        if spec.init_std:
            w = layer.weights[name]
            state = cupy.random.RandomState((seed * 1000 + number) * layer.group.size + layer.group.rank)
            for at in range(0, w.size, 1 << 28):            # in pieces: float32 beside 16 bits takes room
                part = w.reshape(-1)[at:at + (1 << 28)]
                part[...] = state.standard_normal(part.shape, dtype="float32") * (scale * spec.init_std)
    return layer


def finished(function):
    """The function, and then an idle GPU."""
    def call():
        function()
        cupy.cuda.get_current_stream().synchronize()
        torch.cuda.synchronize()
    return call


def relative_difference(x, y):
    """Largest difference of a CuPy array and a tensor over the largest value."""
    x, y = as_torch(x).double(), y.double().reshape(x.shape)
    torch.cuda.synchronize()
    return float((x - y).abs().max() / y.abs().max())


def norm_difference(x, y):
    """Norm of the difference of a CuPy array and a tensor over the norm of the tensor."""
    x, y = as_torch(x).double(), y.double()
    torch.cuda.synchronize()
    return float((x - y).norm() / y.norm())


def torch_graph(function):
    """The function recorded and replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
