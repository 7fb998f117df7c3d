"""The style where it can be counted: width, length, arguments, tokens a line, comments."""
import ast
import io
import tokenize

import pytest
from conftest import ROOT

FILES = sorted(path.relative_to(ROOT).as_posix() for folder in (
    "", "plumbing", "readers", "releases", "s3pt", "experiments", "miniature", "tests")
    for path in (ROOT / folder).glob("*.py"))
LEARNERS = [name for name in FILES if name.startswith(("readers/", "s3pt/")) or "/" not in name]
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)


def text_of(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_lines_functions_and_files_are_short(name):
    lines = text_of(name).splitlines()
    assert len(lines) <= 400
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []
    for node in ast.walk(ast.parse(text_of(name))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (90 if node.name in ("main", "parse") else 60), node.name
            names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            assert len([n for n in names if n != "self"]) <= 8, node.name


def test_what_learners_read_has_room():
    tokens = code = comments = lines = 0
    for name in LEARNERS:
        found = list(tokenize.generate_tokens(io.StringIO(text_of(name)).readline))
        real = [token for token in found if token.type not in LAYOUT]
        tokens += len(real)
        code += len({token.start[0] for token in real})
        comments += sum(line.strip().startswith("#") for line in text_of(name).splitlines())
        lines += len(text_of(name).splitlines())
    assert tokens / code <= 10.5
    assert comments / lines >= 0.035
