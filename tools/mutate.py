"""Breaks formulas on purpose and sees whether a test notices.

python tools/mutate.py                         every loss
python tools/mutate.py mmkd/losses/pkd.py      one file
python tools/mutate.py --list mmkd/ops/*.py    what would be tried

Each mutant is one change of a kind named in WAYS, tried on a copy of the tree
with the file's own tests and a loss's contracts. One that no test notices is
printed, and the exit status is 1. Those that change nothing that could be
noticed stand, with the reason, in tools/mutate_equal.txt and are not tried.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Mutants that are no mistakes: `FILE: WAY: CHANGE`, reasons as comments.
EQUAL = ROOT / 'tools' / 'mutate_equal.txt'
#: What a copy of the tree needs so that tests run in it.
PARTS = ('mmkd', 'tests', 'configs', 'demo', 'tools', 'docs')
FILES = ('pyproject.toml', 'README.md', 'setup.py')
#: Constants below are there so that nothing is divided by 0.
TINY = 1e-4
#: Names of arguments that a mutant takes away.
MASKS = re.compile(r'(mask|weight|valid|there|foreground|background|share)s?$')
TEMPERATURES = ('temperature', 'tau')
SIDES = ('student', 'teacher')
SWAPS = dict(
    sum='mean', mean='sum', amax='amin', amin='amax', exp='abs', abs='neg'
)
SWAPS |= dict(square='abs', sqrt='abs', log='abs', sigmoid='tanh')
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
COMPARISONS = {
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
}

WAYS = dict(
    factor='a constant factor or summand is doubled',
    exponent='a power is one higher',
    axis='an axis is dropped from several, or is another one',
    reduction='sum for mean, largest for smallest, a function for another',
    detach='the student is cut off from the loss',
    teacher='the teacher is ignored',
    swap='student and teacher change places',
    mask='a mask or weight is left out',
    temperature='the temperature is left out',
    operator='plus for minus, times for divided by',
    comparison='a bound counts that did not, or the other way round',
    clamp='a bound is taken away',
)


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        way: Its kind, a key of :data:`WAYS`.
        line: Where.
        text: The changed file.
        change: What was changed into what.
    """

    way: str
    line: int
    text: str
    change: str


# ------------------------------------------------------------------- mutants


def mutants(source: str) -> list[Mutant]:
    """Every single change of a module's functions, each once.

    Args:
        source: The module.
    """
    tree = ast.parse(source)
    found, seen = [], set()
    for way, place, changed in _changes(tree):
        text = _with(tree, place, changed)
        if text in seen:
            continue
        seen.add(text)
        what = f'{_short(place)} -> {_short(changed)}'
        if isinstance(place, ast.FunctionDef):
            what = place.name
        found.append(Mutant(way, place.lineno, text, what))
    return found


def _with(tree: ast.AST, place: ast.AST, changed: ast.AST) -> str:
    """The module with one node replaced; ``tree`` stays as it is."""

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return changed if node is place else self.generic_visit(node)

    # A transformer writes into the nodes above the one it replaces.
    memo = {id(place): place}
    other = Replace().visit(copy.deepcopy(tree, memo))
    return ast.unparse(ast.fix_missing_locations(other))


def _short(node: ast.AST) -> str:
    text = ' '.join(ast.unparse(node).split())
    return text if len(text) < 60 else f'{text[:56]} ...'


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        if function.name == '__init__':
            continue
        yield from _sides(function)
        for statement in function.body:
            for node in _formulas(statement):
                yield from _expression(node)


def _formulas(statement: ast.stmt) -> Iterator[ast.AST]:
    """Nodes of a statement, without messages, annotations and functions."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.FunctionDef)):
            continue
        yield node
        skip = getattr(node, 'annotation', None)
        waiting += [
            one for one in ast.iter_child_nodes(node) if one is not skip
        ]


def _sides(
    function: ast.FunctionDef,
) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Student cut off, teacher ignored, both exchanged."""
    names = [one.arg for one in function.args.args]
    if not set(SIDES) <= set(names):
        return
    body = function.body
    start = int(
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
    )
    for way, line in (
        ('detach', 'student = _each(lambda x: x.detach(), student)'),
        ('teacher', 'teacher = _each(lambda x: 0 * x, teacher)'),
        ('swap', 'student, teacher = teacher, student'),
    ):
        other = copy.copy(function)
        new = ast.parse(f'{EACH}\n{line}').body
        other.body = [*body[:start], *new, *body[start:]]
        yield way, function, other


#: Applies a function to a tensor or to each of several.
EACH = (
    'def _each(f, x):\n'
    '    return type(x)(map(f, x)) if isinstance(x, (list, tuple)) else f(x)'
)


def _expression(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if isinstance(node, ast.BinOp):
        yield from _binary(node)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        kind = COMPARISONS.get(type(node.ops[0]))
        if kind is not None:
            other = copy.copy(node)
            other.ops = [kind()]
            yield 'comparison', node, other


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant):
        other = copy.copy(node)
        other.right = ast.Constant(node.right.value + 1)
        yield 'exponent', node, other
        return
    sides = (node.left, node.right)
    for index, one in enumerate(sides):
        if _number(one) and not _tiny(one):
            other = copy.copy(node)
            double = ast.Constant(2 * one.value)
            other.left, other.right = (
                (double, node.right) if index == 0 else (node.left, double)
            )
            yield 'factor', node, other
        if isinstance(node.op, ast.Mult) and MASKS.search(_name(one)):
            yield 'mask', node, sides[1 - index]
        if _name(one) in TEMPERATURES and (
            isinstance(node.op, ast.Mult) or index == 1
        ):
            yield 'temperature', node, sides[1 - index]
    kind = OPERATORS.get(type(node.op))
    if kind is not None and not any(map(_tiny, sides)):
        other = copy.copy(node)
        other.op = kind()
        yield 'operator', node, other


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if not isinstance(node.func, ast.Attribute):
        return
    name = node.func.attr
    if name in ('clamp', 'clamp_') and isinstance(node.func.value, ast.AST):
        if not any(_tiny(one.value) for one in node.keywords):
            yield 'clamp', node, node.func.value
        return
    if name in SWAPS and not _is_torch(node.func.value):
        other = copy.copy(node)
        other.func = copy.copy(node.func)
        other.func.attr = SWAPS[name]
        if name in ('sum', 'mean', 'amax', 'amin') or not node.args:
            yield 'reduction', node, other
    places = [(None, index) for index in range(len(node.args))]
    places += [(one, None) for one in node.keywords if one.arg == 'dim']
    if not AXES.match(name):
        return
    for keyword, index in places:
        value = keyword.value if keyword else node.args[index]
        for changed in _axes(value):
            other = copy.copy(node)
            if keyword:
                new = ast.keyword('dim', changed)
                other.keywords = [
                    new if one is keyword else one for one in node.keywords
                ]
            else:
                other.args = [*node.args]
                other.args[index] = changed
            yield 'axis', node, other


#: Methods whose whole numbers are axes.
AXES = re.compile(
    r'(sum|mean|amax|amin|softmax|log_softmax|norm|std|var|std_mean|normalize'
    r'|prod|cat|stack|flatten|unflatten|movedim|logsumexp|cosine_similarity)$'
)


def _axes(node: ast.AST) -> Iterator[ast.AST]:
    """Other axes in the place of an axis, or fewer of several."""
    if isinstance(node, ast.Tuple) and len(node.elts) > 1:
        if all(_number(one) for one in node.elts):
            yield ast.Tuple(node.elts[1:], ast.Load())
            yield ast.Tuple(node.elts[:-1], ast.Load())
    elif _number(node) and isinstance(node.value, int):
        yield ast.Constant(0 if node.value else 1)


def _number(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, (int, float))
        and not isinstance(node.value, bool)
    )


def _tiny(node: ast.AST) -> bool:
    if _number(node):
        return 0 < abs(node.value) < TINY
    return _name(node) == 'eps'


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ''


def _is_torch(node: ast.AST) -> bool:
    return _name(node) in ('torch', 'F', 'nn')


# ------------------------------------------------------------------- running


def excused(file: Path) -> set[tuple[str, str]]:
    """Ways and changes of a file that cannot be noticed."""
    found = set()
    for line in EQUAL.read_text(encoding='utf-8').splitlines():
        if line.strip() and not line.startswith('#'):
            name, way, change = line.split(': ', 2)
            if ROOT / name == file.resolve():
                found.add((way, change))
    return found


def tests_of(file: Path) -> Path:
    """A module's own test file."""
    parts = file.resolve().relative_to(ROOT / 'mmkd').parts
    folders = [f'test_{part}' for part in parts[:-1]]
    return Path('tests', *folders, f'test_{parts[-1]}')


def contracts_of(file: Path, source: str) -> list[str]:
    """Words for pytest that visit the contracts of a loss's classes."""
    if file.resolve().parent.name != 'losses':
        return []
    names = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    ]
    return ['tests/test_contracts.py', '-k', ' or '.join(names)]


class Bench:
    """A copy of the tree in which mutants are tried.

    What takes long to import is imported once; each mutant is tried in a
    child of this process.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        for part in PARTS:
            shutil.copytree(
                ROOT / part,
                folder / part,
                ignore=shutil.ignore_patterns('__pycache__'),
            )
        for name in FILES:
            shutil.copy(ROOT / name, folder)
        os.environ.update(OMP_NUM_THREADS='1', MMCV_WITH_OPS='0')
        os.environ['PYTHONPATH'] = str(folder)
        sys.path[:0] = [str(folder), str(folder / 'tests')]
        sys.dont_write_bytecode = True
        _import_what_takes_long()

    def passes(self, *words: str) -> bool:
        """Whether tests pass in the tree as it is now.

        Args:
            *words: Of pytest's command line.
        """
        child = os.fork()
        if not child:
            self._test(words)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0

    def _test(self, words: tuple[str, ...]) -> None:
        import pytest

        os.chdir(self.folder)
        signal.alarm(int(self.limit))  # one that hangs has been noticed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        options = ['-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist']
        os._exit(int(pytest.main([*options, *words])))

    def survivors(self, file: Path) -> tuple[Counter, list[Mutant]]:
        """Try every mutant of a file.

        Returns:
            How many of each way were tried, and those that no test noticed.

        Raises:
            RuntimeError: If the tests fail without any change.
        """
        place = self.folder / file.relative_to(ROOT)
        tests = str(tests_of(file))
        source = place.read_text(encoding='utf-8')
        contracts = contracts_of(file, source)
        if not (self.folder / tests).is_file() or not self.passes(tests):
            raise RuntimeError(
                f'{tests} is not there or fails as it is: run it first.'
            )
        alive, counts = [], Counter()
        try:
            equal = excused(file)
            for one in mutants(source):
                if (one.way, one.change) in equal:
                    counts['equal'] += 1
                    continue
                counts[one.way] += 1
                place.write_text(one.text, encoding='utf-8')
                if self.passes(tests) and (
                    not contracts or self.passes(*contracts)
                ):
                    alive.append(one)
                    _say(f'  survives: {_told(file.relative_to(ROOT), one)}')
        finally:
            place.write_text(source, encoding='utf-8')
        return counts, alive


def _import_what_takes_long() -> None:
    import pytest  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    for name in (
        'torch._dynamo',
        'mmengine.runner',
        'mmcv',
        'scipy.stats',
        'matplotlib.pyplot',
        'pycocotools.coco',
    ):
        with contextlib.suppress(ImportError):
            __import__(name)


def _told(file: Path, one: Mutant) -> str:
    return f'{file}: {one.way}: {one.change} (line {one.line})'


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run ``mutate.py``; 1 if a mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='*', type=Path)
    parser.add_argument(
        '--list', action='store_true', help='say what would be tried'
    )
    parser.add_argument(
        '--limit', type=float, default=300, help="seconds of one file's tests"
    )
    options = parser.parse_args(arguments)
    files = options.files or sorted((ROOT / 'mmkd' / 'losses').glob('*.py'))
    files = [one.resolve() for one in files if one.name != '__init__.py']
    if options.list:
        for file in files:
            for one in mutants(file.read_text(encoding='utf-8')):
                _say(_told(file.relative_to(ROOT), one))
        return 0
    left = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.limit)
        for file in files:
            begin = time.time()
            counts, alive = bench.survivors(file)
            ways = ', '.join(f'{way} {n}' for way, n in sorted(counts.items()))
            seconds = time.time() - begin
            _say(
                f'{file.relative_to(ROOT)}: {counts.total()} mutants '
                f'({ways}), {len(alive)} survive, {seconds:.0f} s'
            )
            left += len(alive)
    _say('none survives' if not left else f'{left} survive')
    return int(left > 0)


if __name__ == '__main__':
    sys.exit(main())
