"""Where a Python file can be mutated, and how: one small mistake a mutation, as an edit of the text."""
import ast
import re
from dataclasses import dataclass

SWAPPED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
           ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.Add: "-", ast.Sub: "+", ast.Mult: "/",
           ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*", ast.MatMult: "*", ast.LShift: ">>",
           ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.And: "or", ast.Or: "and"}
WRITTEN = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
           ast.IsNot: r"is\s+not", ast.In: "in", ast.NotIn: r"not\s+in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
           ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.MatMult: "@", ast.LShift: "<<",
           ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.And: "and", ast.Or: "or"}
NEVER_BREAK = ("comparison", "arithmetic", "logic", "constant", "condition", "function", "augmented")
OTHER = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutation:
    """An edit: the text from `begin` to `end` (character offsets) becomes `now`."""
    file: str               # from the repository's root
    begin: int
    end: int
    was: str
    now: str
    kind: str
    lines: tuple            # of the statement that is changed, or of its head: 1-based, the last one included
    body: tuple             # of the function around it, whose tests count where the line runs at import; or ()
    function: str           # its name, "" outside of any

    @property
    def key(self):
        return f"{self.file}:{self.lines[0]}:{self.begin}-{self.end} {self.kind} -> {self.now}"

    def apply(self, text):
        return text[:self.begin] + self.now + text[self.end:]


class Finder(ast.NodeVisitor):
    """Collects the mutations of one file in `found`."""

    def __init__(self, file, text):
        self.file, self.text, self.found = file, text, []
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.lines, self.function, self.body, self.in_body = (1, 1), "", (), False

    def offset(self, line, column):
        """Characters before a place; ast counts columns in bytes of UTF-8."""
        begin = self.starts[line - 1]
        return begin + len(self.text[begin:self.starts[line]].encode()[:column].decode())

    def span(self, node):
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def add(self, kind, begin, end, now):
        self.found.append(Mutation(self.file, begin, end, self.text[begin:end], now, kind, self.lines,
                                   () if self.in_body else self.body, self.function))

    def visit(self, node):
        if isinstance(node, ast.stmt):
            outer, self.lines = self.lines, (node.lineno, head_end(node))
            super().visit(node)
            self.lines = outer
        else:
            super().visit(node)

    # --- what is not mutated: annotations, what is printed, types -------------------------------------------------

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_arg(self, node):
        pass

    def visit_JoinedStr(self, node):
        pass

    def visit_FunctionDef(self, node):
        outer = self.function, self.body, self.in_body
        self.function, self.body = node.name, (node.body[0].lineno, node.end_lineno)
        self.in_body = False                                    # defaults run where the function is made
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.in_body = True
        for statement in node.body:
            self.visit(statement)
        self.function, self.body, self.in_body = outer

    def visit_ClassDef(self, node):
        outer = self.function, self.body, self.in_body
        self.body, self.in_body = (node.lineno, node.end_lineno), False
        for statement in node.body:
            self.visit(statement)
        self.function, self.body, self.in_body = outer

    def visit_Import(self, node):
        pass

    visit_ImportFrom = visit_Import

    # --- what is ----------------------------------------------------------------------------------------------------

    def operator(self, kind, operator, left, right):
        """Swap the operator that stands between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        written = WRITTEN[type(operator)]
        pattern = written if "\\" in written else re.escape(written)
        found = re.search(pattern, re.sub(r"#[^\n]*", lambda hit: " " * len(hit[0]), self.text[begin:end]))
        if found:
            self.add(kind, begin + found.start(), begin + found.end(), SWAPPED[type(operator)])

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:]):
            self.operator("comparison", operator, left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if not any(isinstance(part, (ast.JoinedStr, ast.Tuple, ast.List)) or isinstance(part, ast.Constant)
                   and isinstance(part.value, str) for part in (node.left, node.right)):
            self.operator("arithmetic", node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        begin, end = self.span(node.target)[1], self.span(node.value)[0]
        found = re.search(re.escape(WRITTEN[type(node.op)]) + "=", self.text[begin:end])
        if found and not isinstance(node.value, (ast.JoinedStr, ast.List)):
            self.add("augmented", begin + found.start(), begin + found.end(), SWAPPED[type(node.op)] + "=")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.operator("logic", node.op, left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add("unary", self.span(node)[0], self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        begin, end = self.span(node)
        if isinstance(node.value, bool):
            self.add("constant", begin, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", begin, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add("constant", begin, end, repr(2 * node.value or 1.0))

    def condition(self, test):
        begin, end = self.span(test)
        self.add("condition", begin, end, f"(not ({self.text[begin:end]}))")

    def visit_If(self, node):
        if getattr(node.test, "id", "") != "TYPE_CHECKING":
            self.condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.condition(node.test)
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.add("statement", *self.span(node), "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Raise(self, node):
        self.add("statement", *self.span(node), "pass")         # its message is not mutated

    def visit_Break(self, node):
        self.add("statement", *self.span(node), "continue")

    def visit_Continue(self, node):
        self.add("statement", *self.span(node), "break")

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in OTHER:
            self.add("function", *self.span(node.func), OTHER[node.func.id])
        before = [*node.args, *node.keywords]
        for keyword in node.keywords:
            place = before.index(keyword)
            if keyword.arg and place and keyword.arg not in ("help", "metavar", "file", "flush"):
                self.add("argument", self.span(before[place - 1])[1], self.span(keyword)[1], "")
        self.generic_visit(node)


def head_end(node):
    """The last line of a simple statement, or of the head of a compound one."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        return max(node.lineno, body[0].lineno - 1)
    return node.end_lineno


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def mutations(file, text):
    """All mutations of a file that are still Python, in order."""
    finder = Finder(file, text)
    finder.visit(ast.parse(text))
    kept = [mutation for mutation in finder.found if mutation.kind in NEVER_BREAK or parses(mutation.apply(text))]
    return sorted(set(kept), key=lambda mutation: (mutation.begin, mutation.end, mutation.now))
