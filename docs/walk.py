"""The walk of x from `python -m mpitp verify` to MPI_Allreduce: a table of docs/design.md, its line numbers found anew.

A step is the function in which it stands, what the line says (its first line behind the function's `def`), and why.
docs/figures.py writes the table; tests/test_docs.py runs `verify` and compares the lines that it executes.
"""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

STEPS = [       # (file in mpitp/, function, text of the line, what happens there)
    ("__main__.py", "run", "return run_command(sys.argv[1:])", "the command line of every rank"),
    ("commands/__init__.py", "run_command", "return command.run(", "`verify` where no command is named"),
    ("commands/verify.py", "run", "return run_checks(", "a group of all ranks is made"),
    ("commands/verify.py", "check_block", "notebook_example(group", "the example of the tutorial first"),
    ("verification/notebook.py", "notebook_example", "layer.forward(x", "x (1, 5, 10), the same on every rank"),
    ("layers/mlp.py", "forward", "copy_to_ranks_forward(x, rows)", "x as rows (5, 10); f"),
    ("layers/products.py", "copy_to_ranks_forward", "return x", "f forward: nothing to do"),
    ("layers/mlp.py", "forward", "self.group.sum(", "a sum is begun, for the partial results"),
    ("layers/mlp.py", "forward", "self.group.each(", "for each block of this rank: here one"),
    ("layers/mlp.py", "block_forward", "= column_parallel_forward(x_ND", "the first product"),
    ("layers/products.py", "column_parallel_forward", "linear_forward(x_NI", "of x and this rank's rows"),
    ("ops/linear.py", "compact_product", "np.matmul(", "NumPy multiplies"),
    ("layers/mlp.py", "block_forward", "activation_forward(self.activation, up_NFb, a_out", "feature by feature"),
    ("layers/mlp.py", "block_forward", "row_parallel_forward(a_NFb", "the second product"),
    ("layers/products.py", "row_parallel_forward", "linear_forward(x_NIb", "of these features and this rank's columns"),
    ("ops/linear.py", "compact_product", "np.matmul(", "a summand of y"),
    ("layers/mlp.py", "forward", "total.add(block, y_ND)", "joins the sum of this rank"),
    ("layers/mlp.py", "forward", "reduce_from_ranks_forward(total, rows)", "g"),
    ("layers/products.py", "reduce_from_ranks_forward", "total.all_reduce()", "g forward: the sum over the ranks"),
    ("comm/sums.py", "all_reduce", "transport.all_reduce(total", "carried by MPI, as the arrays are NumPy's"),
    ("comm/mpi.py", "all_reduce", ".Allreduce(", "`MPI_Allreduce`, in place: y is complete on every rank"),
]


def line_of(file: str, function: str, text: str) -> tuple[int, str]:
    """Return number and text of the first line behind `def function(` that contains the text."""
    lines = (ROOT / "mpitp" / file).read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.lstrip().startswith(f"def {function}(")]
    for number in range(starts[0] + 1, len(lines)):
        if text in lines[number]:
            return number + 1, lines[number].strip()
    raise LookupError(f"found no {text!r} behind {function} in {file}, expected the step of the walk: docs/walk.py")


def table() -> str:
    """Return the walk as a Markdown table: file:line, the line itself, what happens there."""
    rows = []
    for file, function, text, why in STEPS:
        number, line = line_of(file, function, text)
        line = line.split("  #")[0].rstrip().replace("|", r"\|")
        rows.append(f"| `{file}:{number}` | `{line}` | {why} |")
    return "\n".join(["| in `mpitp/` | the line | |", "| --- | --- | --- |", *rows])
