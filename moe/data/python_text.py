"""Splits Python source into its code and the English in its docstrings and comments."""

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HEADER = re.compile(r"#!|#.*coding[:=]")  # for the interpreter, not for a reader
_WORDS = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


class _Docstring(NamedTuple):
    first: int  # 1-based lines, both included
    last: int
    begin: int  # columns in bytes on the first and the last line
    end: int
    alone: bool  # whether the body has no other statement
    text: str


def split_code_and_english(source: str) -> tuple[str, str]:
    """(code without comments and docstrings, docstrings and comments in the order they come).

    The code stays valid Python. Raises SyntaxError if `source` is not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that newer compilers warn of
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    if "\f" in source or len(lines) != source.count("\n") + (not source.endswith("\n")):
        lines = io.StringIO(source).readlines()  # a form feed ends a line for str, not for Python
    english = [(doc.first, doc.text) for doc in _docstrings(tree)]
    comments = list(_comments(source))
    english += _paragraphs(comments)
    for line, column, _ in comments:
        rest = lines[line - 1][:column].rstrip()
        lines[line - 1] = f"{rest}\n" if rest else ""
    for doc in _docstrings(tree):
        _remove(doc, lines)
    return "".join(lines).strip("\n") + "\n", "\n\n".join(text for _, text in sorted(english) if text) + "\n"


def _docstrings(tree: ast.Module) -> Iterator[_Docstring]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            where = node.body[0]
            assert where.end_lineno is not None and where.end_col_offset is not None
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            yield _Docstring(where.lineno, where.end_lineno, where.col_offset, where.end_col_offset, alone, text)


def _comments(source: str) -> Iterator[tuple[int, int, str]]:
    """(line, column, text behind the marks) of every comment."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                text = "" if _HEADER.match(token.string) else token.string.lstrip("#:").rstrip()
                yield *token.start, text
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error


def _paragraphs(comments: list[tuple[int, int, str]]) -> Iterator[tuple[int, str]]:
    """(line, text) of runs of comments in one column on consecutive lines, if there are two words in them."""
    run: list[tuple[int, int, str]] = []
    for comment in [*comments, (-1, -1, "")]:
        if run and comment[:2] != (run[-1][0] + 1, run[-1][1]):
            text = inspect.cleandoc("\n" + "\n".join(text for _, _, text in run))
            if _WORDS.search(text):
                yield run[0][0], text
            run = []
        run.append(comment)


def _remove(doc: _Docstring, lines: list[str]) -> None:
    before = lines[doc.first - 1].encode()[: doc.begin].decode()
    after = lines[doc.last - 1].encode()[doc.end :].decode()
    whole = not before.strip() and not after.strip()
    kept = "" if whole and not doc.alone else f"{before}pass{after}"
    lines[doc.first - 1 : doc.last] = [kept] + [""] * (doc.last - doc.first)
