"""The shape of the code: sizes, direction of imports, one home for each library."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "kvcli").glob("*.py"), *(ROOT / "kvcli").glob("[!k]*/*.py"), *(ROOT / "kernels").glob("*.py")])
# Lower may not import higher.
LEVELS = [
    {"errors", "kernels", "stamp"},
    {"collect", "meta"},
    {"codes", "header", "snapshot", "options"},
    {"budget", "device", "registry", "spool"},
    {"ledger", "profiles"},
    {"fitting", "probes", "receivers", "rotations", "shares", "window"},
    {"methods", "recipe"},
    {"layers", "usual"},
    {"outline"},
    {"storage", "metrics"},
    {"diff", "plan", "process"},
    {"pipeline", "model", "tasks"},
    {"api", "calibrate", "document", "trial"},
    {"evaluate"},
    {"tally"},
    {"bench", "report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}
FREE = {"__init__"}


def package(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imports(path: Path) -> set[str]:
    """First parts of what a file imports: `torch`, or `kvcli.snapshot` for our own."""
    found = set()
    folder = (
        ["kvcli", *path.relative_to(ROOT).parent.parts[1:]] if "kernels" not in path.parts else ["kvcli", "kernels"]
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {".".join(base[:2])} if len(base) > 1 else {f"kvcli.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = package(path)
    for name in imports(path):
        if (
            name.startswith("kvcli.")
            and (there := name.split(".")[1]) not in {here, "__version__"}
            and here not in FREE
        ):
            assert RANK[there] <= RANK[here], f"{here} imports {there}"


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("transformers", {"model"}),
        ("click", {"cli"}),
        ("rich", {"cli"}),
        ("safetensors", set()),
        ("triton", {"kernels"}),
    ],
)
def test_each_library_has_one_home(library: str, home: set[str]) -> None:
    assert {package(path) for path in FILES if library in imports(path)} <= home


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= (120 if path.parent.name == "methods" else 250)
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            kernel = any({"Kernel", "helper"} & {ast.unparse(mark)} for mark in node.decorator_list)
            command = any("click" in ast.unparse(mark) for mark in node.decorator_list)
            assert code_lines(node) <= (60 if kernel else 25), f"{node.name} is {code_lines(node)} lines"
            required = [arg for arg in node.args.args if arg.arg not in ("self", "cls")]
            given = len(required) - len(node.args.defaults)
            assert kernel or command or given <= 6, f"{node.name} takes {given} arguments"


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of the body, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_there_is_a_first_line_that_says_what_a_file_is_for() -> None:
    assert not [path.name for path in FILES if path.read_text().strip() and not path.read_text().startswith('"""')]


def test_no_method_knows_another() -> None:
    methods = [path for path in FILES if path.parent.name == "methods"]
    names = {f"kvcli.methods.{path.stem}" for path in methods} - {"kvcli.methods.__init__"}
    assert len(names) > 25
    for path in methods:
        known = {
            f"kvcli.methods.{node.module}" if node.level == 1 else node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not known & names, path.name
    others = [path for path in FILES if path.parent.name != "methods" and "kernels" not in path.parts]
    assert not [
        path.name for path in others if re.search(r"[\"'](kvmerger|snapkv|h2o|cake|kivi|hack)[\"']", code(path))
    ]


def code(path: Path) -> str:
    """A file without its docstrings and comments, and without the names the command line completes."""
    return "" if path.name == "names.py" else ast.unparse(_bare(ast.parse(path.read_text())))


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
