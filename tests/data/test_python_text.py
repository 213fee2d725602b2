import ast

import pytest

from moe.data.python_text import split_code_and_english

SOURCE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""The module,
with two lines."""

import os  # needed later on

# A comment of
# two lines.
class Äther:
    """Only a docstring."""

def f(x):
    """First.

        indented
    """
    y = "# no comment"  # noqa

    # x = 1
    return """also no
# comment"""

def g(): "one line"

async def h(): "é"; return 1
'''


def test_by_hand():
    code, english = split_code_and_english(SOURCE)
    assert (
        code
        == '''import os

class Äther:
    pass

def f(x):
    y = "# no comment"

    return """also no
# comment"""

def g(): pass

async def h(): pass; return 1
'''
    )
    assert english == (
        "The module,\nwith two lines.\n\nneeded later on\n\nA comment of\ntwo lines.\n\n"
        "Only a docstring.\n\nFirst.\n\nindented\n\none line\n\né\n"
    )


def test_code_is_still_python_and_has_no_docstring():
    code, _ = split_code_and_english(SOURCE)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            assert ast.get_docstring(node) is None


def test_nothing_to_remove():
    assert split_code_and_english("x = 1\n") == ("x = 1\n", "\n")


def test_form_feeds_do_not_shift_lines():
    code, english = split_code_and_english('x = 1\n\f\ndef f():\n    """Two words."""\n    return "\x0b"  # two more\n')
    assert code == 'x = 1\n\f\ndef f():\n    return "\x0b"\n'
    assert english == "Two words.\n\ntwo more\n"


def test_not_python():
    with pytest.raises(SyntaxError):
        split_code_and_english("def f(:\n")
