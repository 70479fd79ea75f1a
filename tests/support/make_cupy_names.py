"""Write tests/data/cupy_names.txt: the public names of a CuPy wheel, read from its source without importing it.

    pip download cupy-cuda12x==14.2.0 --no-deps && python tests/support/make_cupy_names.py cupy_cuda12x-14.2.0-*.whl
"""
import ast
import sys
import zipfile
from pathlib import Path


def public_names(source: str) -> set[str]:
    """Find what a module's source binds when it is imported: imports, functions, classes and assignments."""
    names, statements = set(), list(ast.parse(source).body)
    while statements:
        node = statements.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:                                   # if, try and with: what is inside
            statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            statements += [child for handler in getattr(node, "handlers", ()) for child in handler.body]
    return {name for name in names if not name.startswith("_")}


def main(wheel: str) -> None:
    """Read the wheel and write the list."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(public_names(archive.read("cupy/__init__.py").decode()))
    Path(__file__).parents[1].joinpath("data", "cupy_names.txt").write_text("\n".join(names) + "\n")
    print(f"{len(names)} names of {Path(wheel).name}")


if __name__ == "__main__":
    main(sys.argv[1])
