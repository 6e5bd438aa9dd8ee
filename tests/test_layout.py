"""The library is one file that reads from top to bottom: what keeps that promise, by its syntax tree."""

import ast
import builtins
import re
import symtable
import sys
from textwrap import dedent

import pytest

from helpers import ROOT

SOURCE = (ROOT / 'drifting_pytorch' / 'drifting.py').read_text()
BANNER = re.compile(r'^# ── (\d+)\. (.+) ─+$', re.MULTILINE)
PROVIDED = {*dir(builtins), '__file__', '__name__', '__doc__'}

# sections

def section_starts(source):
    """[(number, line)] of the banners; imports and whatever else stands above the first one are section 0."""
    banners = BANNER.finditer(source)
    return [(int(banner[1]), source.count('\n', 0, banner.start()) + 1) for banner in banners]

def statements(source):
    """(section, statement) of every statement of the module."""
    starts = section_starts(source)
    for statement in ast.parse(source).body:
        yield max((number for number, line in starts if line <= statement.lineno), default = 0), statement

# names

def own_nodes(node):
    """The nodes under a statement that belong to the module's scope: functions and classes, but not what is in them."""
    yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(node):
        yield from own_nodes(child)

def defined_names(statement):
    for node in own_nodes(statement):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.split('.')[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id

def scopes(table):
    yield table
    for child in table.get_children():
        yield from scopes(child)

def loaded_globals(source):
    """Names that a piece of code takes from the module: at once, in function bodies, defaults and annotations."""
    module, *inner = scopes(symtable.symtable(source, 'drifting.py', 'exec'))
    names = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}

    for scope in inner:
        names |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global() and symbol.is_referenced()}

    return names

def annotations(statement):
    for node in ast.walk(statement):
        for field in ('annotation', 'returns'):
            annotation = getattr(node, field, None)
            if annotation is not None:
                yield annotation

def quoted_annotations(statement):
    """'Trainer' in `-> 'Trainer'`, not the letters in `Float['b n d']`."""
    for annotation in annotations(statement):
        subscripts = [node.slice for node in ast.walk(annotation) if isinstance(node, ast.Subscript)]
        letters = {id(node) for subscript in subscripts for node in ast.walk(subscript)}
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in letters:
                yield node.value

def late_names(source):
    """[(section, name)]: names that a section uses although neither it nor a section above defines them."""
    first_section = {}
    for section, statement in statements(source):
        for name in defined_names(statement):
            first_section.setdefault(name, section)

    late = set()
    for section, statement in statements(source):
        for code in (ast.unparse(statement), *quoted_annotations(statement)):
            for name in loaded_globals(code) - PROVIDED:
                if first_section.get(name, float('inf')) > section:
                    late.add((section, name))

    return sorted(late)

IN_ORDER = '''
import math as m

# ── 1. first ──────

def double(x: float) -> float:
    return helper(x) * later(2)

def helper(x, last = m.pi):
    last = [last for SECOND in range(3)]
    return len(last)

later = m.floor

# ── 2. second ──────

SECOND = double(1.)

class Two:
    def copy(self) -> 'Two':
        return Two()
'''

def test_names_in_order():
    assert section_starts(IN_ORDER) == [(1, 4), (2, 15)]
    assert late_names(IN_ORDER) == []

@pytest.mark.parametrize('code, late', [
    ('CONSTANT = SECOND', 'SECOND'),
    ('def f(): return SECOND', 'SECOND'),
    ('def f(x = SECOND): pass', 'SECOND'),
    ('def f(x: Two): pass', 'Two'),
    ("def f(x: m.Float['Two 3']) -> m.Float[Two, '... SECOND']: pass", 'Two'),
    ("def f(x) -> 'Two | None': pass", 'Two'),
    ('class C(Two): pass', 'Two'),
    ('class C:\n    def f(self):\n        return lambda: [Two for _ in range(3)]', 'Two'),
    ('@Two\ndef f(): pass', 'Two'),
    ('if later:\n    x = SECOND', 'SECOND'),
    ('def f(): return nowhere', 'nowhere'),
])
def test_late_names_are_found(code, late):
    source = IN_ORDER.replace('later = m.floor', f'later = m.floor\n\n{code}')
    assert late_names(source) == [(1, late)]

def test_every_section_uses_only_what_stands_above_it():
    numbers = [number for number, _ in section_starts(SOURCE)]
    assert len(numbers) > 1
    assert numbers == list(range(1, len(numbers) + 1))
    assert late_names(SOURCE) == []

# size

def long_functions(source, most = 60):
    """[(name, first line, lines)] of the functions above `most` lines, decorators not counted."""
    nodes = ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [(node.name, node.lineno, node.end_lineno - node.lineno + 1) for node in functions]
    return sorted(length for length in lengths if length[-1] > most)

def conditional_statements(source):
    """Lines of `a() if b else c()` where an if statement would do."""
    nodes = ast.walk(ast.parse(source))
    return sorted(node.lineno for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp))

def long_lines(source, most = 120):
    return [number for number, line in enumerate(source.splitlines(), 1) if len(line) > most]

def density(source):
    """Characters per line that is not blank."""
    lines = [line for line in source.splitlines() if line.strip()]
    return sum(map(len, lines)) / len(lines)

def test_measures_of_size():
    source = dedent('''
        def f(x):

            f(1) if x else f(2)
            return f(1) if x else f(2)
    ''')
    assert long_functions(source, 3) == [('f', 2, 4)]
    assert long_functions(source, 4) == []
    assert conditional_statements(source) == [4]
    assert long_lines(source, 29) == [5]
    assert density(source) == (9 + 23 + 30) / 3

def test_functions_fit_on_a_page():
    assert long_functions(SOURCE) == []

def test_no_conditional_expression_is_a_statement():
    assert conditional_statements(SOURCE) == []

def test_lines_are_short():
    assert long_lines(SOURCE) == []

def test_lines_are_not_dense():
    assert density(SOURCE) <= 62

def test_the_core_is_read_at_one_go():
    """Sections 1 to 4: whoever has only the paper needs no more."""
    ends = dict(section_starts(SOURCE))[5] - 1
    assert ends <= 600

def test_the_file_is_short():
    lines = SOURCE.count('\n')
    assert lines <= 2750        # with everything in it; the wish is 2,400

# dependencies

DISTRIBUTIONS = dict(PIL = 'pillow')        # where the name differs by more than the underscore

def imported_distributions(nodes):
    modules = set()

    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)

    packages = {module.split('.')[0] for module in modules} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(package, package.replace('_', '-')) for package in packages}

def distributions(listed):
    """The names in a list of "name>=1.0" and "name[extra]"."""
    return {name.lower() for name in re.findall(r'"([\w.-]+)[^"]*"', listed)}

def declared(pyproject):
    """What is always installed, and what the extras add. By hand: tomllib came with Python 3.11."""
    required = re.search(r'^dependencies = \[(.*?)^\]', pyproject, re.MULTILINE | re.DOTALL)
    extras = re.search(r'^\[project\.optional-dependencies\]$(.*?)^\[', pyproject, re.MULTILINE | re.DOTALL)
    return distributions(required[1]), distributions(extras[1])

def test_reading_of_dependencies():
    code = ast.parse('import os.path, PIL.Image as I\nfrom ema_pytorch.x import y\nfrom . import z')
    assert imported_distributions(ast.walk(code)) == {'pillow', 'ema-pytorch'}

    pyproject = dedent('''
        dependencies = [
            "torch>=2.6",
            "x-transformers[a]>=2.31",
        ]

        [project.optional-dependencies]
        one = ["msgpack>=1.0"]
        two = [
            "SciPy",
        ]

        [build-system]
        requires = ["hatchling"]
    ''')
    assert declared(pyproject) == ({'torch', 'x-transformers'}, {'msgpack', 'scipy'})

def test_dependencies_are_what_is_imported():
    """At the top of the file what is always installed, in functions also extras."""
    tree = ast.parse(SOURCE)
    at_top = imported_distributions(tree.body)
    everywhere = imported_distributions(ast.walk(tree))
    required, extras = declared((ROOT / 'pyproject.toml').read_text())

    assert at_top <= required, f'imported, but not declared: {sorted(at_top - required)}'
    assert everywhere <= required | extras, f'imported, but in no extra: {sorted(everywhere - required - extras)}'
    assert required <= everywhere, f'declared, but not imported: {sorted(required - everywhere)}'
