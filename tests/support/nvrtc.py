"""NVRTC, the compiler of CUDA kernels, as a library: it needs no GPU. From PyPI: nvidia-cuda-nvrtc-cu12."""
import ctypes
import sys
from pathlib import Path


def library_path() -> Path | None:
    """Find libnvrtc of a wheel in this environment, or of a CUDA toolkit; None where there is none."""
    packages = [Path(folder) / "nvidia" for folder in sys.path if folder]
    folders = [folder for package in packages for folder in sorted(package.glob("*/lib"))]
    folders += [Path("/usr/local/cuda/lib64"), Path("/usr/local/cuda/targets/x86_64-linux/lib")]
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc.so.*")):
            if ".alt." not in path.name:
                return path
    return None


class Compiler:
    """NVRTC's functions.

    Raises
    ------
    FileNotFoundError
        Where there is no NVRTC.
    """

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise FileNotFoundError("no libnvrtc: pip install nvidia-cuda-nvrtc-cu12")
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):         # which NVRTC opens by its name alone
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(path))

    def compile(self, source: str, options: tuple[str, ...] = ()) -> None:
        """Compile a source. Raises SyntaxError with NVRTC's messages and the source that they are about."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self.library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        failed = self.library.nvrtcCompileProgram(program, len(options), given)
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            lines = "\n".join(f"{number:4d} {line}" for number, line in enumerate(source.splitlines(), 1))
            raise SyntaxError(f"{' '.join(options)}\n{log.value.decode()}\n{lines}")
