"""Where text comes from: the running CPython's standard library, a hub dataset, or local files.

The embedded English is 6,600 docstrings and 79 `pydoc_data` topics, 1.9 MB on CPython 3.11, read
in about 2 s. Packages that distributions leave out or ship apart (the tests, tkinter, idlelib, ...)
are not read, so that an interpreter of any origin gives the same text.
"""

import ast
import errno
import glob
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import preflight
from pipeline.config import DataConfig, DataSource
from pipeline.errors import InputError, PipelineError

# Left out or shipped apart by distributions; machine-written; tables and text in place of code.
NOT_READ = re.compile(
    r"(^|/)(site-packages|dist-packages|tests?|idlelib|lib2to3|distutils|tkinter|turtledemo"
    r"|ensurepip|venv|encodings|pydoc_data)(/|$)|^(config-|_sysconfig)"
)
RUN_CHARACTERS = 4096  # about a thousand tokens: the length to which single lines are joined
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


class Document(NamedTuple):
    """A text, and what it must share its split with: a file's path below the library's folder.

    Where no file says what belongs together, a text is its own source.
    """

    source: str
    text: str


def read_documents(cfg: DataConfig) -> Iterator[Document]:
    """The documents that `data` names, in their own order; raises `InputError`."""
    if cfg.source is DataSource.embedded:
        return embedded_documents()
    if cfg.source is DataSource.files:
        return file_documents(cfg.files, cfg.text_column, "data.files")
    return hub_documents(cfg)


def shifted_documents(cfg: DataConfig) -> Iterator[Document]:
    """Text of another domain: `data.shifted_files`, or else the standard library's source."""
    if cfg.shifted_files:
        return file_documents(cfg.shifted_files, cfg.text_column, "data.shifted_files")
    return source_documents()


def local_files(cfg: DataConfig) -> list[Path]:
    """Every file of this machine that those read, in their order; raises `InputError`."""
    files = cfg.files if cfg.source is DataSource.files else []
    return [*_expand(files, "data.files"), *_expand(cfg.shifted_files, "data.shifted_files")]


# The standard library

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def embedded_documents() -> Iterator[Document]:
    """Docstrings in order of module path and position, then the topics of pydoc."""
    from pydoc_data.topics import topics

    for name, path in sorted(_standard_library().items()):
        for node in ast.walk(_parse(path)):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                yield Document(name, docstring)
    for topic, text in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{topic}", text.strip())


def source_documents() -> Iterator[Document]:
    """One document per module: its source, rewritten by `ast` without docstrings and comments.

    In order of a hash of the path, since whoever has a budget reads only the first few.
    """
    for name, path in sorted(_standard_library().items(), key=lambda item: digest(item[0])):
        tree = _parse(path)
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        yield Document(name, ast.unparse(tree))


def _standard_library() -> dict[str, Path]:
    """The modules that are read, by path relative to the library's folder."""
    root, paths = Path(sysconfig.get_path("stdlib")), {}
    for folder, below, files in os.walk(root):
        place = Path(folder).relative_to(root)
        below[:] = [name for name in below if not NOT_READ.search((place / name).as_posix())]
        names = {(place / name).as_posix(): Path(folder, name) for name in files}
        paths |= {name: path for name, path in names.items() if name.endswith(".py")}
    return {name: path for name, path in paths.items() if not NOT_READ.search(name)}


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        return ast.parse(path.read_bytes())


def digest(text: str) -> bytes:
    """A hash that no seed, path or interpreter changes."""
    return hashlib.sha256(text.encode()).digest()


# Datasets


def hub_documents(cfg: DataConfig) -> Iterator[Document]:
    """The rows of a hub dataset; raises `InputError` when it cannot be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = "/".join(filter(None, (cfg.dataset, cfg.subset, cfg.split)))
    assert cfg.dataset
    options: dict[str, Any] = {"revision": cfg.revision, "streaming": cfg.streaming}
    try:
        rows = load_dataset(cfg.dataset, cfg.subset, split=cfg.split, **options)
        yield from _texts(rows, cfg.text_column, name)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise InputError(
            "The dataset cannot be read.",
            value=f"{name}: {_first_line(error)}",
            rule="data.dataset, data.subset and data.split name a dataset that can be reached",
            remedy="check the names and the network; a gated dataset needs `hf auth login`. "
            "data=embedded needs no download",
        ) from None


def file_documents(
    patterns: Iterable[str], text_column: str, key: str = "data.files"
) -> Iterator[Document]:
    """The rows of local txt (lines), jsonl and parquet files, in the order given.

    Args:
        key: of the setting that names them, for messages.

    Raises:
        InputError: no such file, an unknown kind, bad encoding or format, no such column, no text.
    """
    from datasets import load_dataset

    for path in _expand(patterns, key):
        builder = BUILDERS[path.suffix]
        options: dict[str, Any] = {"keep_linebreaks": True} if builder == "text" else {}
        column = "text" if builder == "text" else text_column
        try:
            # `datasets` cannot open a file of no bytes.
            rows = (
                load_dataset(
                    builder,
                    data_files=glob.escape(str(path)),
                    split="train",
                    streaming=True,
                    **options,
                )
                if path.stat().st_size
                else []
            )
            yield from _texts(rows, column, str(path), are_lines=builder == "text")
        except PipelineError:
            raise
        except Exception as error:  # pyarrow and datasets have many kinds for a damaged file
            preflight.let_through(error)
            raise InputError(
                "A file of the data cannot be read.",
                value=f"{path}: {_first_line(error)}",
                rule="txt and jsonl in UTF-8, one JSON object per line; parquet",
                remedy=f"convert the file, or leave it out of {key}",
            ) from None


def _expand(patterns: Iterable[str], key: str) -> list[Path]:
    """The files that the patterns match, each pattern's sorted."""
    found = []
    for pattern in patterns:
        # Path.glob takes no absolute pattern.
        literal = Path(pattern).is_file()  # a name may hold brackets
        names = [pattern] if literal else glob.glob(pattern, recursive=True)  # noqa: PTH207
        matched = sorted(Path(name).absolute() for name in names)
        wrong = [path for path in matched if path.suffix not in BUILDERS or not path.is_file()]
        if wrong or not matched:
            raise InputError(
                f"A name in {key} cannot be read." if wrong else "There is no such file.",
                value=wrong[0] if wrong else Path(pattern).absolute(),
                rule=f"existing files that end in {', '.join(BUILDERS)}",
                remedy=f"correct {key}",
            )
        found += matched
    return found


def _texts(
    rows: Iterable[Any], column: str, name: str, are_lines: bool = False
) -> Iterator[Document]:
    """The rows' texts; `InputError` without the column, or when no row holds any text.

    Args:
        are_lines: all of them, the last one too, which may have no newline.
    """
    blank, texts = True, _column(rows, column, name)
    if are_lines:
        texts = (text if text.endswith("\n") else f"{text}\n" for text in texts)
    for document in _join_lines(texts):
        blank = False
        yield document
    if blank:
        raise InputError(
            "There is no text in the data.",
            value=f"{name}: every row is blank, or there is none",
            rule=f"at least one row with text in {column!r}",
            remedy="name other data, or another data.text_column",
        )


def _column(rows: Iterable[Any], column: str, name: str) -> Iterator[str]:
    for row in rows:
        text = row.get(column, 0)
        if text is not None and not isinstance(text, str):
            found = f"columns {', '.join(sorted(row))}"
            if column in row:
                found = f"a value of type {type(text).__name__} there, among {found}"
            raise InputError(
                "The data has no such column of text.",
                value=f"data.text_column={column}; {name} has {found}",
                rule="data.text_column names a column of strings",
                remedy="set data.text_column to a column of strings, or write the texts as strings",
            )
        yield text or ""


def _join_lines(rows: Iterable[str]) -> Iterator[Document]:
    """Rows that end in a newline, or are empty, are lines of a longer text (WikiText, txt files).

    Those are joined to runs of `RUN_CHARACTERS`; any other row is a document.
    """
    lines: list[str] = []
    size = 0
    for row in rows:
        if row.strip() and not row.endswith("\n"):
            yield from _run(lines)
            yield Document(row, row)
            lines, size = [], 0
            continue
        lines.append(row or "\n")
        size += len(row)
        if size >= RUN_CHARACTERS:
            yield from _run(lines)
            lines, size = [], 0
    yield from _run(lines)


def _run(lines: list[str]) -> Iterator[Document]:
    text = "".join(lines).strip()
    if text:
        yield Document(text, text)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
