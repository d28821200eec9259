"""The code that a stage runs: its sources are a part of what its results are made of."""

import ast
from functools import cache
from pathlib import Path

from pipeline.artifacts import file_digest, json_digest

PACKAGE = Path(__file__).parent


def import_closure(module: str) -> list[Path]:
    """Files of this package that importing `module` can run, function-level imports included."""
    closed: set[Path] = set()
    open_ = [module]
    while open_:
        path = _module_path(open_.pop())
        if path and path not in closed:
            closed.add(path)
            open_ += _imports(path)
    return sorted(closed | {PACKAGE / "__init__.py"})


def _module_path(module: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(path: Path) -> list[str]:
    names: list[str] = []
    open_: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while open_:
        node = open_.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # never runs
        open_ += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


@cache
def code_digest(module: str) -> str:
    """Digest of the sources in `import_closure(module)`."""
    return json_digest(
        {str(p.relative_to(PACKAGE)): file_digest(p) for p in import_closure(module)}
    )
