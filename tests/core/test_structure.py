"""The shape of the package: who imports whom, how long the core is, and what no module holds."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "stepengine"
FILES = sorted(PACKAGE.rglob("*.py"))
BELOW = {"core", "model", "trace", "viz", "contracts", "errors", "stages", ""}  # and the stages; the rest is on top


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, lazily, for types only) of each import of the package itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, bool, bool]] = []

    def visit(node: ast.AST, lazy: bool, types: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            only = types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                found.extend((name.name, inside, only) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module_of(path).split(".")
                    package = package if path.name == "__init__.py" else package[:-1]
                    base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
                submodules = [f"{base}.{name.name}" for name in child.names if is_module(f"{base}.{name.name}")]
                found.extend((name, inside, only) for name in submodules or [base])
            visit(child, inside, only)

    visit(tree, False, False)
    return [entry for entry in found if entry[0].split(".")[0] == "stepengine"]


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def part(module: str) -> str:
    """First name below the package; "" for the package itself."""
    return (module.split(".") + [""])[1]


def allowed(path: Path, module: str, lazy: bool) -> bool:
    here, there = part(module_of(path)), part(module)
    if there in ("errors", here):
        return True
    stage = re.match(r"stage(\d)_", here)
    if stage:
        earlier = re.match(r"stage(\d)_", there)
        return there in ("core", "model", "") or (earlier is not None and earlier[1] < stage[1])
    if here in ("errors", "model"):
        return False
    if here == "core":
        return there == "model"
    if here == "trace":
        return module == "stepengine.core.plan"
    if here == "viz":
        drives = path.name in ("player.py", "widgets.py") and lazy and there == "llm"
        return there in ("trace", "calculator") or module == "stepengine.core.plan" or drives
    if here == "calculator":
        return there == "model"
    if here == "contracts":
        return there in ("core", "model", "trace") or (lazy and there == "llm")
    if here == "stages":
        return there == "core"
    if here == "":
        return lazy and there in ("llm", "core")
    return here not in BELOW


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    wrong = [module for module, lazy, types in imports(path) if not types and not allowed(path, module, lazy)]
    assert not wrong, f"{module_of(path)} must not import {wrong}"


def test_the_import_test_sees_what_it_must():
    core = PACKAGE / "core" / "engine.py"
    assert not allowed(core, "stepengine.stage0_naive.cache", False) and not allowed(core, "stepengine.llm", True)
    assert not allowed(PACKAGE / "stage0_naive" / "cache.py", "stepengine.stage1_kvcache.cache", True)
    assert allowed(PACKAGE / "stage1_kvcache" / "engine.py", "stepengine.stage0_naive.engine", False)
    assert not allowed(PACKAGE / "trace" / "io.py", "stepengine.core.engine", False)
    assert not allowed(PACKAGE / "viz" / "memory.py", "stepengine.llm", True)
    seen = {module for module, _, _ in imports(PACKAGE / "stage1_kvcache" / "engine.py")}
    assert {"stepengine.stage1_kvcache.cache", "stepengine.stage0_naive.engine"} <= seen


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docs |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - docs)


def test_lines_of_code_are_counted_as_said():
    source = '"""Doc.\n\nMore."""\n\n# why\nx = 1  # note\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    assert code_lines(source) == 4


def test_core_can_be_read_in_one_sitting():
    sizes = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in (PACKAGE / "core").glob("*.py")}
    switches = sum(sizes.pop(name) for name in ("graphs.py", "pipelined.py", "streams.py"))
    assert sum(sizes.values()) <= 1270 and switches <= 220, sizes  # ARCHITECTURE.md says why it is not 700


def test_plans_have_no_phases():
    assert [path for path in FILES if "is_prefill" in path.read_text(encoding="utf-8")] == []


def mutable(value: ast.AST | None) -> bool:
    makers = ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict")
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in makers
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def state_of(source: str) -> list[str]:
    """Names bound to something mutable at module level, and `global` statements; constants in capitals are none."""
    tree = ast.parse(source)
    found = [name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and mutable(node.value):
            found += [ast.unparse(target) for target in targets if target is not None]
    return [name for name in found if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__all__", name)]


def test_no_module_holds_state():
    assert state_of("seen = []\nA = {}\n_B: dict = {}\nx: dict = dict()\ndef f():\n    global y\n") == [
        "y",
        "seen",
        "x",
    ]
    assert {str(path): names for path in FILES if (names := state_of(path.read_text(encoding="utf-8")))} == {}


def changed_by_functions(source: str) -> list[str]:
    """Constants in capitals that some code changes all the same."""
    tree = ast.parse(source)
    names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    names |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    verbs = {
        "append",
        "extend",
        "add",
        "update",
        "pop",
        "clear",
        "setdefault",
        "insert",
        "remove",
        "discard",
        "popitem",
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in verbs:
            found += [node.func.value.id] if isinstance(node.func.value, ast.Name) else []
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            found += [t.value.id for t in targets if isinstance(t, ast.Subscript) and isinstance(t.value, ast.Name)]
    return [name for name in found if name in names and name.isupper()]


def test_constants_stay_constant():
    assert changed_by_functions("SEEN = {}\ndef f(x):\n    SEEN[x] = 1\n    SEEN.pop(x)\n") == ["SEEN", "SEEN"]
    changed = {str(path): changed_by_functions(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: names for path, names in changed.items() if names} == {}


HEAVY = ("plotly", "ipywidgets", "anywidget", "typer", "rich", "gguf", "IPython", "triton")


@pytest.mark.parametrize(
    "module", ["stepengine", "stepengine.core.engine", "stepengine.llm", "stepengine.stage1_kvcache.engine"]
)
def test_importing_the_engine_pulls_in_nothing_optional(module: str):
    script = f"import {module}, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_importing_the_package_alone_does_not_load_torch():
    script = "import stepengine, sys; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment).stdout
        == "False\n"
    )
