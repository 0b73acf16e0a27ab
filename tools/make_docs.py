"""Write what the documentation repeats from the code.

``docs/method_cards.md`` comes from the docstrings of losses, alignments,
terms, schedules and backbones and from the configs' cards; the README's table
of methods stands between ``<!-- methods:begin -->`` and
``<!-- methods:end -->``.

    python tools/make_docs.py           write them
    python tools/make_docs.py --check   fail if they are out of date
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmkd  # noqa: F401
from mmkd.registry import MODELS, SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
CARDS = Path('docs') / 'method_cards.md'
MARKERS = ('<!-- methods:begin -->', '<!-- methods:end -->')
SECTIONS = ('Args', 'Attributes', 'Returns', 'Raises', 'Reference', 'Example')

#: Heading, package or module, and what stands below the heading.
KINDS = (
    (
        'Losses',
        'mmkd.losses',
        'How far apart student and teacher are. In a term: '
        "`loss=dict(type='mmkd.…')`.",
    ),
    (
        'Terms',
        'mmkd.terms',
        'Tap, align, compare. In a config: '
        "`model = dict(terms=dict(name=dict(type='mmkd.…')))`.",
    ),
    (
        'Weights',
        'mmkd.terms.weights',
        'How much each cell counts. In a term whose loss takes a weight: '
        "`weight=dict(type='mmkd.…')`.",
    ),
    (
        'Alignments',
        'mmkd.necks',
        "What makes the student's maps comparable. In a term: "
        "`align=dict(type='mmkd.…')`.",
    ),
    (
        'Schedules',
        'mmkd.schedules',
        'Progress of the training in [0, 1] → factor. In a term: '
        "`schedule=dict(type='mmkd.…')`.",
    ),
    (
        'Backbones',
        'mmkd.backbones',
        "In a detector: `backbone=dict(type='mmkd.…')`.",
    ),
    ('Detectors', 'mmkd.detectors', 'Students that deploy more than one.'),
)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the generated texts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--check', action='store_true', help='write nothing, only compare'
    )
    options = parser.parse_args(arguments)
    stale = []
    for path, text in generate(root).items():
        if path.is_file() and path.read_text(encoding='utf-8') == text:
            continue
        stale.append(path.relative_to(root).as_posix())
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding='utf-8')
    if stale and options.check:
        print(
            f'{", ".join(stale)}: out of date. Type: make docs',
            file=sys.stderr,
        )
        return 1
    print(f'wrote {", ".join(stale)}' if stale else 'up to date')
    return 0


def generate(root: Path = ROOT) -> dict[Path, str]:
    """Every generated file and the text it should have.

    Args:
        root: Folder of configs, docs and README.

    Raises:
        ValueError: If the README has only one of its two markers.
    """
    configs = read_configs(root / 'configs')
    kinds = [
        (heading, text, list(read_methods(package)))
        for heading, package, text in KINDS
    ]
    texts = {root / CARDS: cards_page(kinds, configs)}
    readme = root / 'README.md'
    if readme.is_file():
        losses, terms = kinds[0][2], kinds[1][2]
        methods = losses + [one for one in terms if one.paper()[1]]
        table = method_table(methods, configs)
        text = readme.read_text(encoding='utf-8')
        texts[readme] = between_markers(text, table)
    return texts


# ------------------------------------------------------------------- the code


@dataclass
class Docstring:
    """A docstring taken apart.

    Attributes:
        text: What stands before the first section.
        sections: The others by name, without their indentation.
    """

    text: str
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, docstring: str | None) -> Docstring:
        """Split a docstring of Google's form.

        Example:
            >>> parsed = Docstring.parse('A.\\n\\nArgs:\\n    x: B.')
            >>> parsed.text, parsed.sections
            ('A.', {'Args': 'x: B.'})
        """
        parts: dict[str, list[str]] = {'': []}
        name = ''
        for line in inspect.cleandoc(docstring or '').splitlines():
            if line.rstrip(':') in SECTIONS and line.endswith(':'):
                name = line[:-1]
                parts[name] = []
            else:
                parts[name].append(line)
        texts = {
            name: inspect.cleandoc('\n' + '\n'.join(lines))
            for name, lines in parts.items()
        }
        return cls(texts.pop(''), texts)

    @property
    def reference(self) -> str:
        return self.sections.get('Reference', '')

    def arguments(self) -> dict[str, str]:
        """Descriptions of the arguments, each on one line."""
        found: dict[str, str] = {}
        last = ''
        for line in self.sections.get('Args', '').splitlines():
            head = re.match(r'(\*{0,2}\w+(?:, \w+)*): (.*)', line)
            if head:
                last, found[head[1]] = head[1], head[2]
            elif last:
                found[last] += ' ' + line.strip()
        return found


@dataclass
class Method:
    """A module that registers something, and what its card says.

    Attributes:
        title: Name of the method.
        about: What it does, one sentence.
        module: The module.
        classes: What it registers.
        functions: Its public functions that have a docstring.
    """

    title: str
    about: str
    module: ModuleType
    classes: list[type]
    functions: list[Any]

    @property
    def path(self) -> str:
        return f'{self.module.__name__.replace(".", "/")}.py'

    @property
    def test(self) -> str:
        *folders, name = self.module.__name__.split('.')[1:]
        folder = ''.join(f'test_{one}/' for one in folders)
        return f'tests/{folder}test_{name}.py'

    def paper(self) -> tuple[str, str]:
        """Venue with year and address of its source, '' where not named."""
        sources = [
            ' '.join(Docstring.parse(one.__doc__).reference.split())
            for one in (*self.classes, *self.functions)
        ]
        # The class names it first, the function may spell it out.
        found = re.search(_ADDRESS, ' '.join(sources))
        if not found:
            return '', ''
        address = found[0]
        venue = re.search(
            rf'", ([^,"]+ \d{{4}}), {re.escape(address)}', ' '.join(sources)
        )
        number = address.removeprefix('arXiv:')
        if number != address:
            address = f'https://arxiv.org/abs/{number}'
        return venue[1] if venue else found[0], address


_ADDRESS = r'arXiv:\d{4}\.\d{4,5}|https://\S+[^\s.,;]'


def read_methods(package: str) -> Iterator[Method]:
    """What a package, or one module, registers.

    A module of losses is one method; elsewhere each class has its own card.
    """
    parent = importlib.import_module(package)
    names = [
        f'{package}.{one.name}'
        for one in pkgutil.iter_modules(getattr(parent, '__path__', []))
    ]
    for name in names or [package]:
        module = importlib.import_module(name)
        classes = _registered(module)
        if package != 'mmkd.losses':
            for one in classes:
                about = _summary(module)[1]
                yield Method(one.__name__, about, module, [one], [])
        elif classes:
            title, about = _summary(module)
            functions = _functions(module)
            yield Method(title, about, module, classes, functions)


def _summary(module: ModuleType) -> tuple[str, str]:
    """Title and sentence of a module's first line, ``Title: sentence.``"""
    first = inspect.getdoc(module).split('\n\n')[0]
    title, _, about = ' '.join(first.split()).partition(': ')
    return title, about[:1].upper() + about[1:]


def _functions(module: ModuleType) -> list[Any]:
    """Public functions of a module whose docstring has sections."""
    return [
        one
        for name, one in vars(module).items()
        if inspect.isfunction(one)
        and one.__module__ == module.__name__
        and not name.startswith('_')
        and Docstring.parse(one.__doc__).sections
    ]


def _registered(module: ModuleType) -> list[type]:
    entries = [*MODELS.module_dict.values(), *SCHEDULES.module_dict.values()]
    return list(
        dict.fromkeys(
            one for one in entries if one.__module__ == module.__name__
        )
    )


@dataclass
class Card:
    """Docstring of a config.

    Attributes:
        path: The config, from the root.
        title: Its first paragraph.
        fields: ``Published`` and the like.
        types: Components of mmkd that it names.
    """

    path: str
    title: str
    fields: dict[str, str]
    types: set[str]


def read_configs(folder: Path) -> list[Card]:
    """The cards of all configs below a folder, by path."""
    cards = []
    for path in sorted(folder.rglob('*.py')):
        source = path.read_text(encoding='utf-8')
        tree = ast.parse(source)
        docstring = ast.get_docstring(tree)
        if not docstring:
            continue
        title, *rest = docstring.split('\n\n')
        types = {
            node.value.removeprefix('mmkd.')
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r'mmkd\.\w+', node.value)
        }
        cards.append(
            Card(
                path=path.relative_to(folder.parent).as_posix(),
                title=' '.join(title.split()),
                fields=_fields('\n\n'.join(rest)),
                types=types,
            )
        )
    return cards


def _fields(text: str) -> dict[str, str]:
    """``Name: value`` lines and what is indented below them."""
    found: dict[str, str] = {}
    last = ''
    for line in text.splitlines():
        head = re.match(r"([A-Z][\w' ]+): (.*)", line)
        if head:
            last, found[head[1]] = head[1], head[2]
        elif last and line.startswith('    '):
            found[last] += ' ' + line.strip()
        else:
            last = ''
    return found


# ------------------------------------------------------------------- the pages


def cards_page(
    kinds: list[tuple[str, str, list[Method]]], configs: list[Card]
) -> str:
    """The text of ``docs/method_cards.md``."""
    parts = [
        '# Method cards',
        '<!-- Generated by tools/make_docs.py; edit the docstrings. -->',
        'What each component computes, its settings and their defaults, its '
        'source, and where we deviate from it. This page is made from the '
        'docstrings by `make docs`.',
    ]
    for heading, text, methods in kinds:
        if not methods:
            continue
        links = ' · '.join(
            f'[{one.title}](#{anchor(one.title)})' for one in methods
        )
        parts += [f'## {heading}', f'{text}', links]
        parts += [card(one, configs) for one in methods]
    return '\n\n'.join(parts) + '\n'


def card(method: Method, configs: list[Card]) -> str:
    """One method: its classes, its mathematics, its configs."""
    links = [f'[source](../{method.path})']
    if (ROOT / method.test).is_file():
        links.append(f'[test](../{method.test})')
    about = f'{markdown(method.about)} ' if method.about else ''
    parts = [f'### {method.title}', f'{about}({", ".join(links)})']
    for one in method.classes:
        parts += _class_parts(one, method)
    for one in method.functions:
        docstring = Docstring.parse(one.__doc__)
        parts.append(f'**`{one.__name__}{_signature(one)}`**')
        parts.append(markdown(docstring.text))
        parts += _section_parts(docstring)
    names = {one.__name__ for one in method.classes}
    users = [one for one in configs if one.types & names]
    if users and method.module.__name__.startswith('mmkd.losses'):
        parts.append(_config_table(users))
    return '\n\n'.join(part for part in parts if part)


def _class_parts(component: type, method: Method) -> list[str]:
    docstring = Docstring.parse(component.__doc__)
    scope = getattr(component, 'scope', 'level')
    joint = ', sees all levels at once' if scope == 'levels' else ''
    return [
        f"**`type='mmkd.{component.__name__}'`**{joint}",
        markdown(docstring.text),
        _settings_table(component, docstring, method),
        *_section_parts(docstring),
    ]


def _section_parts(docstring: Docstring) -> list[str]:
    parts = []
    for name in ('Returns', 'Reference'):
        if name in docstring.sections:
            text = markdown(docstring.sections[name])
            parts.append(f'{name}: {text}')
    return parts


def _settings_table(
    component: Any, docstring: Docstring, method: Method
) -> str:
    described: dict[str, str] = {'loss_weight': 'The outer factor.'}
    sources = [
        *(Docstring.parse(one.__doc__) for one in method.functions),
        *(Docstring.parse(one.__doc__) for one in _bases(component)),
        docstring,
    ]
    for source in sources:
        for names, text in source.arguments().items():
            described.update(dict.fromkeys(names.split(', '), text))
    rows = [
        f'| `{name}` | {_default(parameter)} | '
        f'{_cell(markdown(described.get(name, "")))} |'
        for name, parameter in inspect.signature(component).parameters.items()
    ]
    if not rows:
        return ''
    return '\n'.join(['| setting | default | |', '|---|---|---|', *rows])


def _bases(component: Any) -> list[type]:
    """Bases in the package, the most general first."""
    family = reversed(getattr(component, '__mro__', ()))
    return [one for one in family if one.__module__.startswith('mmkd.')]


def _default(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return ''
    if parameter.default is parameter.empty:
        return 'required'
    return f'`{_cell(repr(parameter.default))}`'


def _signature(function: Any) -> str:
    names = [
        name if one.default is one.empty else f'{name}={one.default!r}'
        for name, one in inspect.signature(function).parameters.items()
    ]
    return f'({", ".join(names)})'


def _config_table(configs: list[Card]) -> str:
    rows = [
        f'| [{one.title.rstrip(".")}](../{one.path}) | '
        f'{_cell(_plain(one.fields.get("Published", "")))} | '
        f'{_cell(_plain(one.fields.get("Trained by us", "")))} |'
        for one in configs
    ]
    head = '| config | published | trained by us |'
    return '\n'.join([head, '|---|---|---|', *rows])


def method_table(methods: list[Method], configs: list[Card]) -> str:
    """The README's table: one row a loss, or a term that is a method."""
    rows = [
        '| method | the idea | source | type | configs |',
        '|' + '---|' * 5,
    ]
    for method in methods:
        names = [one.__name__ for one in method.classes]
        users = [one for one in configs if one.types & set(names)]
        venue, address = method.paper()
        folders = sorted({Path(one.path).parent.as_posix() for one in users})
        link = ', '.join(f'[{Path(one).name}]({one})' for one in folders)
        cells = (
            f'[{method.title}](docs/method_cards.md#{anchor(method.title)})',
            _cell(markdown(method.about)),
            f'[{venue}]({address})' if address else '',
            ', '.join(f'`{name}`' for name in names),
            link,
        )
        rows.append(f'| {" | ".join(cells)} |')
    return '\n'.join(rows)


def between_markers(text: str, table: str) -> str:
    """A page with the part between its markers replaced.

    Example:
        >>> between_markers('a ' + 'x'.join(MARKERS) + ' b', 'T').split()[-2:]
        ['-->', 'b']

    Raises:
        ValueError: If a marker is missing.
    """
    begin, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise ValueError(
            f'README.md needs {MARKERS[0]} and, below it, {MARKERS[1]} where '
            f'the table of methods shall stand.'
        )
    head = text[: begin + len(MARKERS[0])]
    return f'{head}\n{table}\n{text[end:]}'


# ------------------------------------------------------------------ the markup


def markdown(text: str) -> str:
    """Turn the little reStructuredText that docstrings use into Markdown.

    Example:
        >>> markdown('The form of :func:`pkd_loss`, :math:`1 - r`.')
        'The form of `pkd_loss`, $1 - r$.'
    """
    return '\n\n'.join(_block(one) for one in _blocks(text))


def _blocks(text: str) -> list[str]:
    """Paragraphs; what is indented belongs to the one it follows."""
    blocks: list[str] = []
    for one in re.split(r'\n\s*\n', text):
        if one.startswith(' ') and blocks and _opens_code(blocks[-1]):
            blocks[-1] += f'\n\n{one}'
        else:
            blocks.append(one)
    return [one for one in blocks if one.strip()]


def _opens_code(block: str) -> bool:
    head = block.split('\n\n')[0].rstrip()
    return head.endswith('::') or head.startswith('.. code-block::')


def _block(block: str) -> str:
    if block.startswith('.. math::'):
        return _formula(block.removeprefix('.. math::'))
    head, _, code = block.partition('\n\n')
    if code and _opens_code(block):
        code = inspect.cleandoc('\n' + code)
        language, text = 'text', _plain(head.rstrip()[:-1])
        if head.startswith('.. code-block::'):
            language, text = head.split()[-1], ''
        # Not run by the tests: what it stands in is a fragment.
        note = ' no-run' if language == 'python' else ''
        return f'{text}\n\n```{language}{note}\n{code}\n```'.strip()
    if re.match(r'=+( +=+)+$', block.splitlines()[0].strip()):
        return f'```text\n{inspect.cleandoc(block)}\n```'
    return _items(block) if block.startswith('- ') else _plain(block)


def _formula(text: str) -> str:
    lines = [one.strip() for one in text.splitlines() if one.strip()]
    if any('&' in one for one in lines):
        lines = ['\\begin{aligned}', *lines, '\\end{aligned}']
    return '\n'.join(['$$', *lines, '$$'])


def _items(block: str) -> str:
    """A list, one line an item."""
    items = re.split(r'^- ', block, flags=re.MULTILINE)[1:]
    return '\n'.join(f'- {_plain(item)}' for item in items)


def _plain(text: str) -> str:
    text = ' '.join(text.split())
    text = re.sub(r':math:`([^`]*)`', r'$\1$', text)
    text = re.sub(r':\w+:`~?(?:[\w.]*\.)?(\w+)`', r'`\1`', text)
    return text.replace('``', '`')


def _cell(text: str) -> str:
    return text.replace('|', '\\|').replace('\n', ' ')


def anchor(heading: str) -> str:
    """The name by which GitHub links a heading.

    Example:
        >>> anchor('FGD, focal part')
        'fgd-focal-part'
    """
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


if __name__ == '__main__':
    sys.exit(main())
