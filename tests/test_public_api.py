"""The public names: documented as numpydoc's parser reads it, annotated, known to type checkers; their examples run.

`python tests/test_public_api.py` prints all that is missing.
"""
import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mpitp

ROOT = Path(__file__).resolve().parents[1]

# numpydoc's checks, https://numpydoc.readthedocs.io/en/latest/validation.html: of every public object,
CHECKS = {
    "GL06", "GL07",             # sections: known ones, in the usual order
    "GL08", "SS03", "SS04",     # a docstring, whose summary ends with a period
    "PR02", "PR03",             # parameters that are described exist, in the same order
    "PR04", "PR07", "PR10",     # each has a type and a description, "name : type"
    "RT03",                     # what is returned is described
}
# and of the names of mpitp themselves, whose parameters are described one by one.
OF_NAMES = CHECKS | {"PR01", "RT01", "YD01"}


def public_objects():
    """{"Name" or "Class.method": object} of everything in mpitp.__all__; a method that is inherited counts once."""
    found, seen = {}, set()
    for name in mpitp.__all__:
        found[name] = getattr(mpitp, name)
        if inspect.isclass(found[name]):
            for attribute, value in inspect.getmembers(found[name]):
                function = getattr(value, "fget", value)
                module = getattr(function, "__module__", None) or ""
                if not attribute.startswith("_") and callable(function) and module.startswith("mpitp") \
                        and function not in seen:
                    seen.add(function)
                    found[f"{name}.{attribute}"] = value
    return found


def undocumented():
    """{name: what numpydoc complains about}."""
    validate = pytest.importorskip("numpydoc.validate")
    found = {}
    for name in public_objects():
        checks = CHECKS if "." in name else OF_NAMES
        errors = [f"{code} {text}" for code, text in validate.validate(f"mpitp.{name}")["errors"] if code in checks]
        if errors:
            found[name] = errors
    return found


def unannotated_signature(function, of_class=False):
    """The parameters of a function that have no annotation, and "return"."""
    signature = inspect.signature(function)
    missing = [name for name, parameter in signature.parameters.items()
               if parameter.annotation is parameter.empty and name not in ("self", "cls")]
    return missing + (["return"] if signature.return_annotation is signature.empty and not of_class else [])


def unannotated():
    """{name: its parameters without an annotation} of the public names and their methods."""
    found = {}
    for name, value in public_objects().items():
        function = getattr(value, "fget", value)
        if inspect.isclass(function) and issubclass(function, Exception):
            continue
        missing = unannotated_signature(function, inspect.isclass(function))
        if missing:
            found[name] = [", ".join(missing)]
    return found


def unannotated_modules():
    """{module: its functions at module level that are not annotated throughout}."""
    found = {}
    for path in sorted((ROOT / "mpitp").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
                         *filter(None, (arguments.vararg, arguments.kwarg))]
                if node.returns is None or any(argument.annotation is None for argument in every):
                    name = ".".join(path.relative_to(ROOT / "mpitp").with_suffix("").parts)
                    found.setdefault(name, []).append(node.name)
    return found


MISSING = {"documentation": undocumented, "annotations": unannotated, "annotations of functions": unannotated_modules}


def report(missing):
    return "\n".join(f"{name}\n" + "\n".join(f"    {text}" for text in texts) for name, texts in missing.items())


@pytest.mark.parametrize("kind", MISSING)
def test_nothing_is_missing(kind):
    missing = MISSING[kind]()
    assert not missing, f"{len(missing)} lack {kind}:\n{report(missing)}"


def test_examples_run():
    """Docstrings' examples, in all modules that have some; those on a GPU are not run."""
    ran = 0
    for path in sorted((ROOT / "mpitp").rglob("*.py")):
        if ">>> " in path.read_text() and "cuda" not in path.parts:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert not failed, path
            ran += tried
    print(f"{ran} examples")


def test_the_parser_sees_what_is_wrong(monkeypatch):
    """A parameter without a type, one too many, a section of its own, no docstring at all."""
    pytest.importorskip("numpydoc")

    def wrong(x, y):
        """Add.

        Parameters
        ----------
        x, z
            Numbers.

        Returned
        --------
        The sum.
        """
        return x + y

    def silent(x):
        return x

    monkeypatch.setattr(mpitp, "wrong", wrong, raising=False)
    monkeypatch.setattr(mpitp, "silent", silent, raising=False)
    monkeypatch.setattr(mpitp, "__all__", ["wrong", "silent"])
    found = undocumented()
    assert {text.split()[0] for text in found["wrong"]} >= {"PR01", "PR02", "PR04"}
    assert {text.split()[0] for text in found["silent"]} == {"GL08"}
    assert unannotated() == {"wrong": ["x, y, return"], "silent": ["x, return"]}


def test_type_checkers_see_the_names_that_are_there():
    """They read __init__.pyi; the program, _HOMES."""
    tree = ast.parse((ROOT / "mpitp" / "__init__.pyi").read_text())
    seen = {alias.asname: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == mpitp._HOMES and sorted(seen) == mpitp.__all__


def test_a_misspelt_name_is_an_error(tmp_path):
    """For mypy, and for a program that runs."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("import mpitp\n\nmpitp.ParallelMLP\nmpitp.ParalelMLP\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(program)], cwd=ROOT,
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if "program.py" in line]
    assert len(errors) == 1 and 'program.py:4: error: Module has no attribute "ParalelMLP"' in errors[0]
    with pytest.raises(AttributeError, match="ParalelMLP"):
        mpitp.ParalelMLP  # noqa: B018


if __name__ == "__main__":
    for kind, find in MISSING.items():
        missing = find()
        print(f"{len(missing)} lack {kind}\n{report(missing)}\n")
