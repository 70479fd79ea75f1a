"""The house keeps its floors: who may import whom, what stays short. `python tests/test_architecture.py` prints it.

Imports are read out of the sources, late ones included; nothing is run.
"""
import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mpitp"

# A part of mpitp imports from itself and from lower floors, never from another part of its own floor.
FLOORS = {
    "errors": 0,
    "arrays": 1, "require_numbers": 1, "tables": 1, "attention_config": 1.2, "config": 1.5,
    "sharding": 2,
    "ops": 3, "oracle": 3,
    "comm": 4,
    "grid": 4.5,
    "layers": 5,
    "plan": 5.5,
    "inference": 6, "checkpoints": 6,
    "training": 7,
    "court": 8, "measure": 8, "timeline": 8, "verification": 8,
    "commands": 9,
    "__main__": 10,
}
# The oracle judges; what is judged must not lean on it.
USES_THE_ORACLE = {"oracle", "court", "measure", "verification", "commands"}
# The only parts that talk to other processes.
IMPORTS_MPI = {"comm", "__main__"}
# Where a module is chosen by a name at run time. Its arrows cannot be read here, so these stay few.
CHOOSES_A_MODULE = {"__init__", "arrays", "ops.twin", "checkpoints.families.__init__", "commands.__init__",
                    "oracle.check", "timeline.spans"}

# Limits, and what is above them for a reason.
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 8
LONG_FILES = set()
LONG_FUNCTIONS = set()
# An op takes what its equation names, a constructor what a user may choose, by keyword.
MANY_PARAMETERS = {
    "comm.group:TensorParallelGroup.__init__", "inference.generation:generate",
    "layers.linear:ColumnParallelLinear.__init__", "layers.mlp:ParallelMLP.__init__",
    "ops.keys_values:last_query_forward", "ops.cuda.keys_values:last_query_forward",
    "ops.adamw:adamw_step", "ops.attention:attention_backward", "ops.attention:attention_forward",
    "ops.cuda.adamw:adamw_step", "ops.cuda.attention:attention_backward", "ops.cuda.attention:attention_forward",
}
# Decorators.
NESTED_FUNCTIONS = {"ops.twin:cuda_twin.decorate", "ops.twin:cuda_twin.decorate.dispatch",
                    "timeline.spans:timed_call.call", "timeline.spans:timed_by_thread.call",
                    "timeline.spans:timed_on_device.call"}


def sources():
    """{name of the module without mpitp: its source}; a package is NAME.__init__."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
            for path in sorted(PACKAGE.rglob("*.py"))}


SOURCES = sources()
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}


def target(module, level, dotted, name):
    """The module of mpitp that `from dotted import name` in `module` imports, without mpitp, else None."""
    parts = dotted.split(".") if dotted else []
    if level:
        parts = module.split(".")[:-level] + parts
    elif parts[0] != "mpitp":
        return None
    else:
        parts = parts[1:]
    for candidate in ([*parts, name], [*parts, name, "__init__"], parts, [*parts, "__init__"]):
        if ".".join(candidate) in TREES:
            return ".".join(candidate)
    raise AssertionError(f"{module} imports {name} from {dotted}, which is not there")


def imports(tree):
    """(level, module, name) of all imports of a file, those inside functions too; for `import a.b`, (0, "a.b", "")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.level, node.module, alias.name


def arrows():
    """{module: the modules of mpitp that it imports}, without the version, which the face has for everybody."""
    found = defaultdict(set)
    for module, tree in TREES.items():
        for level, dotted, name in imports(tree):
            if name != "__version__":
                found[module].add(target(module, level, dotted, name))
    return {module: targets - {None} for module, targets in found.items()}


def part(module):
    return module.split(".")[0]


def upward():
    """The arrows that point upward or sideways, "from -> to". The face points everywhere: it knows where names are."""
    return {f"{module} -> {other}" for module, others in arrows().items() for other in others
            if module != "__init__" and part(module) != part(other)
            and FLOORS[part(module)] <= FLOORS[part(other)]}


def circles():
    """The modules that import themselves by way of others, a late import included; one line a circle."""
    graph, found = arrows(), set()
    reach = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        reach[start] = seen
    for module, seen in reach.items():
        ring = {other for other in seen if module in reach.get(other, ())}
        if ring and module != "__init__":
            found.add(" <-> ".join(sorted(ring - {"__init__"})))
    return found


def functions(tree, prefix=""):
    """(qualified name, node, whether it stands inside another function) of every def, outermost first."""
    for node in ast.iter_child_nodes(tree):
        inside = isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node, inside
            for name, inner, _ in functions(node, f"{prefix}{node.name}."):
                yield name, inner, True
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def all_functions():
    for module, tree in TREES.items():
        for name, node, inside in functions(tree):
            yield f"{module}:{name}", node, inside


def parameters(node):
    """How many parameters a function has, without self and cls."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def file_lengths():
    return {module: len(source.splitlines()) for module, source in SOURCES.items()}


def function_lengths():
    """Lines of each function, its docstring not counted."""
    lengths = {}
    for name, node, _ in all_functions():
        first = node.body[0]
        text = ast.get_docstring(node, clean=False) is not None
        lengths[name] = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if text else 0)
    return lengths


def parameter_counts():
    return {name: parameters(node) for name, node, _ in all_functions()}


def above(counts, limit, named):
    return {name for name, count in counts.items() if count > limit} - named


def nested_functions():
    return {name for name, _, inside in all_functions() if inside} - NESTED_FUNCTIONS


BROKEN = {
    "arrows": upward,
    "circles": circles,
    "files": lambda: above(file_lengths(), FILE_LINES, LONG_FILES),
    "functions": lambda: above(function_lengths(), FUNCTION_LINES, LONG_FUNCTIONS),
    "parameters": lambda: above(parameter_counts(), PARAMETERS, MANY_PARAMETERS),
    "nested": nested_functions,
}


@pytest.mark.parametrize("rule", BROKEN)
def test_the_rule(rule):
    """Nothing breaks the rule but what is listed."""
    assert sorted(BROKEN[rule]()) == []


def test_exceptions_are_needed():
    """A name in a list of exceptions still is one."""
    assert {name for name, count in file_lengths().items() if count > FILE_LINES} >= LONG_FILES
    assert {name for name, count in function_lengths().items() if count > FUNCTION_LINES} >= LONG_FUNCTIONS
    assert {name for name, count in parameter_counts().items() if count > PARAMETERS} >= MANY_PARAMETERS
    assert {name for name, _, inside in all_functions() if inside} >= NESTED_FUNCTIONS


def test_every_part_has_a_floor():
    assert {part(module) for module in TREES} - {"__init__"} <= set(FLOORS)


def test_comm_alone_speaks_to_other_processes():
    for module, tree in TREES.items():
        foreign = {dotted.split(".")[0] for level, dotted, _ in imports(tree) if level == 0}
        nccl = any(level == 0 and "nccl" in f"{dotted}.{name}".split(".") for level, dotted, name in imports(tree))
        assert part(module) in IMPORTS_MPI or not ("mpi4py" in foreign or nccl), module


def test_the_oracle_is_used_by_those_who_compare():
    users = {part(module) for module, others in arrows().items() if any(part(other) == "oracle" for other in others)}
    assert users - {"__init__"} <= USES_THE_ORACLE


def test_modules_are_chosen_by_name_in_few_places():
    found = {module for module, tree in TREES.items() for node in ast.walk(tree)
             if getattr(node, "attr", getattr(node, "id", None)) in ("import_module", "__import__")}
    assert found <= CHOOSES_A_MODULE


def test_the_reading_of_imports():
    """Late, relative and absolute ones are seen, modules and names out of modules told apart."""
    tree = ast.parse("def f():\n    if 1:\n        from ..comm import launch, group as g\n"
                     "import mpitp.errors\nimport numpy")
    found = [target("layers.mlp", *one) for one in imports(tree)]
    assert sorted(filter(None, found)) == ["comm.group", "comm.launch", "errors"] and None in found
    tree = ast.parse("class A:\n    def f(self):\n        if 1:\n            def g(): pass\n"
                     "        class B:\n            def h(self): pass")
    assert [(name, inside) for name, _, inside in functions(tree)] == [
        ("A.f", False), ("A.f.g", True), ("A.f.B.h", True)]


def show():
    for title, counts, limit in (("lines of files", file_lengths(), FILE_LINES),
                                 ("lines of functions, without docstrings", function_lengths(), FUNCTION_LINES),
                                 ("parameters", parameter_counts(), PARAMETERS)):
        print(f"\n{title}: limit {limit}, together {sum(counts.values())}, {len(counts)} of them; the largest")
        for name, count in sorted(counts.items(), key=lambda item: -item[1])[:12]:
            print(f"{count:6d}  {name}")
    nested = sorted(name for name, _, inside in all_functions() if inside)
    print(f"\n{len(nested)} functions inside functions")
    for name in nested:
        print(f"        {name}")
    pairs = {(part(a), part(b)) for a, others in arrows().items() for b in others if a != "__init__"}
    print("\narrows between parts, by floors")
    for name, floor in sorted(FLOORS.items(), key=lambda item: -item[1]):
        others = sorted(b for a, b in pairs if a == name and b != name)
        print(f"{floor:6d}  {name:12s} -> {', '.join(others) or 'none'}")
    for rule, broken in BROKEN.items():
        print(f"\n{rule} that break the rule: {len(broken())}")
        for name in sorted(broken()):
            print(f"        {name}")


if __name__ == "__main__":
    show()
