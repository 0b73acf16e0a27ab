"""Write what the documentation repeats from the code.

``docs/method_cards.md`` comes from the docstrings of losses, alignments,
terms, schedules and backbones and from the configs' cards. From the same
source are ``docs/methods.md``, the README's table of methods, between
``<!-- methods:begin -->`` and ``<!-- methods:end -->``, a page and a metafile
for each folder of ``configs``, and ``model-index.yml``, which lists these.

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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from mmdet.registry import MODELS as DETECTORS
from mmengine.registry import init_default_scope
from torch import nn

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmkd  # noqa: F401
from mmkd.build import build
from mmkd.checks import check_name
from mmkd.configs import read_config
from mmkd.registry import DATASETS, MODELS, SCHEDULES, TRANSFORMS

ROOT = Path(__file__).resolve().parents[1]
CARDS = Path('docs') / 'method_cards.md'
METHODS = Path('docs') / 'methods.md'
INDEX = Path('model-index.yml')
MARKERS = ('<!-- methods:begin -->', '<!-- methods:end -->')
SECTIONS = ('Args', 'Attributes', 'Returns', 'Raises', 'Not kept')
SECTIONS += ('Reference', 'Example')

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
    (
        'Data',
        'mmkd.datasets',
        'What comes with the pictures. In a config: '
        "`train_dataloader=dict(dataset=dict(type='mmkd.…'))`, or in a "
        'pipeline.',
    ),
)

#: What a section is called on a card.
TITLES = {'Not kept': 'Not kept of what losses promise'}

#: What the methods of a family compare. The first card of a folder of configs
#: says which it is.
FAMILIES = {
    'feature': 'maps of backbone or neck as a whole',
    'focal region': 'maps where objects are, or where the teacher looks',
    'generation': "the teacher's map, made from a part of the student's",
    'relational': 'how places or objects resemble each other',
    'response': 'class scores, boxes, masks: what the heads say',
    'instance': 'single objects: where the two differ most, or one query each',
    'query': (
        'detectors of queries: what decoders say, ask, and where they look'
    ),
    'procedure': (
        'what other methods compare: new is what is trained when, or on what'
    ),
    'group': (
        'nothing itself; it weighs other terms, or chooses their teachers'
    ),
}

#: Families of methods by title that have no folder of configs.
PARTS = {
    'BalancedTerm': 'group',
    'CLoCKDistill, memory part': 'query',
    'FGD, focal part': 'focal region',
    'FGD, global part': 'relational',
    'MemoryTerm': 'query',
}

#: Terms whose layers are known only beside the student and the teacher.
LATE = {'AssistantTerm', 'OneTerm'}


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
    told = [one for _, _, methods in kinds for one in methods]
    losses, terms = kinds[0][2], kinds[1][2]
    methods = losses + [one for one in terms if one.paper()[1]]
    rows = read_rows(configs, told, root)
    rows += parts_of(methods, configs)
    texts[root / METHODS] = methods_page(rows)
    for row in rows:
        if row.folder:
            folder = root / 'configs' / row.folder
            texts[folder / 'README.md'] = folder_page(row)
            texts[folder / 'metafile.yml'] = metafile(row)
    texts[root / INDEX] = model_index(rows)
    readme = root / 'README.md'
    if readme.is_file():
        text = readme.read_text(encoding='utf-8')
        texts[readme] = between_markers(text, method_table(rows))
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

    @property
    def reference(self) -> str:
        """All that stands under ``Reference:``, on one line."""
        # The class names it first, the function may spell it out.
        return ' '.join(
            ' '.join(Docstring.parse(one.__doc__).reference.split())
            for one in (*self.classes, *self.functions)
        )

    def paper(self) -> tuple[str, str]:
        """Venue with year and address of its source, '' where not named."""
        found = re.search(_ADDRESS, self.reference)
        if not found:
            return '', ''
        address = found[0]
        venue = re.search(
            rf'", ([^,"]+ \d{{4}}), {re.escape(address)}', self.reference
        )
        return venue[1] if venue else found[0], _link(address)

    def citation(self) -> dict[str, str]:
        """Authors, title, venue, year and address of its first source."""
        return _cited(self.reference)


_ADDRESS = r'arXiv:\d{4}\.\d{4,5}|https://\S+[^\s.,;]'
#: Authors, "Title", VENUE YEAR, arXiv:NUMBER
_SOURCE = (
    r'(?P<authors>[A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)?), '
    r'"(?P<title>[^"]+)"(?:, (?:(?P<venue>[^",]+) )?(?P<year>\d{4}))?, '
    rf'(?P<address>{_ADDRESS})'
)


def _cited(text: str) -> dict[str, str]:
    found = re.search(_SOURCE, text)
    return {} if found is None else found.groupdict(default='')


def _link(address: str) -> str:
    return address.replace('arXiv:', 'https://arxiv.org/abs/')


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
    entries = [
        one
        for registry in (MODELS, SCHEDULES, DATASETS, TRANSFORMS)
        for one in registry.module_dict.values()
    ]
    return list(
        dict.fromkeys(
            one
            for one in entries
            if one.__module__ == module.__name__ and inspect.isclass(one)
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

    @property
    def folder(self) -> str:
        return Path(self.path).parts[1]

    @property
    def variant(self) -> str:
        """First word of the file's name: the folder's, or one with more."""
        return Path(self.path).name.partition('_')[0]

    @property
    def _summary(self) -> re.Match:
        found = _SUMMARY.fullmatch(self.title)
        if found is None:
            raise ValueError(
                f'{self.path}: its first line must read "METHOD: STUDENT '
                f'(40.2 AP alone) learns from TEACHER (44.7 AP).", got '
                f'{self.title!r}.'
            )
        return found

    @property
    def student(self) -> str:
        return re.sub(r'^Faster (?!R-CNN)', 'Faster R-CNN ', self._summary[1])

    @property
    def detector(self) -> str:
        """The student without its size, which is the last word."""
        return self.student.rpartition(' ')[0]

    @property
    def alone(self) -> float:
        return float(self._summary[2])

    @property
    def teacher(self) -> str:
        return self._summary[3]

    @property
    def teacher_ap(self) -> str:
        """Of each teacher; '' if none is a detector of its own."""
        return self._summary[4] or ''

    @property
    def published(self) -> float | None:
        """AP after distillation, of the source that the card names first."""
        found = re.match(r'(\d+\.\d) AP', self._field('Published'))
        return found and float(found[1])

    @property
    def base(self) -> float | None:
        """AP of the same source's student alone, None if it is another's."""
        said = self._field('Published')
        found = re.search(
            r'(?:student alone has|student with) (\d+\.\d)', said
        )
        if found is None and 'not to be compared' in said:
            return None
        return float(found[1]) if found else self.alone

    @property
    def family(self) -> str:
        """A key of :data:`FAMILIES`."""
        return self._told[1]

    @property
    def told_by(self) -> str | None:
        """The component whose docstring tells the method; None if it is the
        loss that is named like the folder."""
        return self._told[2]

    @property
    def _told(self) -> re.Match:
        found = _FAMILY.fullmatch(self._field('Family'))
        if found is None or found[1] not in FAMILIES:
            raise ValueError(
                f'{self.path}: its card has the family '
                f'{self.fields["Family"]!r}. Write "Family: NAME." or, where '
                f'no loss is named like the folder, "Family: NAME, by '
                f'COMPONENT.", with one of {", ".join(FAMILIES)}.'
            )
        return found

    @property
    def epochs(self) -> int:
        return int(re.match(r'\d+(?= epochs)', self._field('Schedule'))[0])

    def _field(self, name: str) -> str:
        if name not in self.fields:
            raise ValueError(f'{self.path}: its card has no {name!r}.')
        return self.fields[name]


_FAMILY = re.compile(r'([a-z ]+)(?:, by (\w+))?\.')
_SUMMARY = re.compile(
    r'[^:]+: (.+) \((\d+\.\d) AP alone\) learns from (.+?)'
    r'(?: \((\d+\.\d(?:, \d+\.\d)*) AP\))?\.'
)


def read_configs(folder: Path) -> list[Card]:
    """The cards of the published experiments below a folder, by path."""
    cards = []
    for path in sorted(folder.rglob('*_coco.py')):
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
    for name in ('Returns', 'Not kept', 'Reference'):
        if name in docstring.sections:
            text = markdown(docstring.sections[name])
            parts.append(f'{TITLES.get(name, name)}: {text}')
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


@dataclass
class Row:
    """A method as the tables have it; every field is filled.

    Attributes:
        title: Its name.
        method: The component whose docstring tells it.
        family: A key of :data:`FAMILIES`.
        types: Components of its configs that have a source of their own.
        folder: Below ``configs``; '' for what has no config of its own.
        configs: Cards of its published experiments.
        tiny: Paths of its tiny configs, from the root.
        layers, parameters: What its terms add to the first experiment.
    """

    title: str
    method: Method
    family: str
    types: list[str]
    folder: str = ''
    configs: list[Card] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    layers: str = ''
    parameters: int = 0

    @property
    def about(self) -> str:
        return self._said('Idea') or self.method.about

    def _said(self, name: str) -> str | None:
        """A field of its first card that few have."""
        return self.configs[0].fields.get(name) if self.configs else None

    @property
    def paper(self) -> tuple[str, str]:
        """As :meth:`Method.paper`."""
        if source := self._said('Source'):
            name, _, address = source.rpartition(', ')
            return name, address
        if not self._said('Idea'):
            return self.method.paper()
        if not (found := self.citation):
            return '', ''
        venue = f'{found["venue"]} {found["year"]}'.strip()
        return venue or found['address'], _link(found['address'])

    @property
    def source(self) -> str:
        """Link to the paper; 'ours' where there is none."""
        venue, address = self.paper
        return f'[{venue}]({address})' if address else 'ours'

    @property
    def citation(self) -> dict[str, str]:
        """As :meth:`Method.citation`; empty if there is none to cite."""
        if self._said('Source'):
            return {}
        if self._said('Idea'):  # of a method that uses another's loss
            return _cited(self.configs[0].fields['Read'])
        return self.method.citation()

    @property
    def detectors(self) -> str:
        return ', '.join(sorted({one.detector for one in self.configs}))


def read_rows(
    configs: list[Card], methods: list[Method], root: Path
) -> list[Row]:
    """One row for each folder of configs, by title.

    Args:
        configs: The cards of all published experiments.
        methods: All components.
        root: Folder of configs.

    Raises:
        ValueError: If a fact is missing; the message says what to write.
    """
    folders: dict[str, list[Card]] = {}
    for one in configs:
        folders.setdefault(one.folder, []).append(one)
    found = []
    for folder, cards in folders.items():
        cards.sort(key=lambda card: (card.variant != folder, card.path))
        method = _teller(cards[0], methods)
        layers, parameters = own_layers(root / cards[0].path)
        tiny = sorted(
            (root / 'configs' / folder / 'tiny').glob('*.py'),
            key=lambda path: (path.stem != f'{folder}_tiny', path.stem),
        )
        found.append(
            Row(
                title=cards[0].title.partition(':')[0],
                method=method,
                family=cards[0].family,
                types=_types_of(cards, methods, method),
                folder=folder,
                configs=cards,
                tiny=[one.relative_to(root).as_posix() for one in tiny],
                layers=layers,
                parameters=parameters,
            )
        )
    return sorted(found, key=lambda row: row.title.lower())


def parts_of(methods: list[Method], configs: list[Card]) -> list[Row]:
    """Rows of the methods that no published experiment names."""
    named = {kind for one in configs for kind in one.types}
    return [
        Row(
            title=one.title,
            method=one,
            family=_family_of_part(one.title),
            types=[kind.__name__ for kind in one.classes],
        )
        for one in methods
        if not named & {kind.__name__ for kind in one.classes}
    ]


def _family_of_part(title: str) -> str:
    if title not in PARTS:
        raise ValueError(
            f'{title} is a method that no card of configs/ names. Give it a '
            f'config, or its family in PARTS of tools/make_docs.py: '
            f'{", ".join(FAMILIES)}.'
        )
    return PARTS[title]


def _teller(card: Card, methods: list[Method]) -> Method:
    """The method whose docstring tells what a folder of configs does."""
    named = card.told_by
    for method in methods:
        if named in [one.__name__ for one in method.classes]:
            return method
        module = f'mmkd.losses.{card.folder.replace("-", "_")}'
        if named is None and method.module.__name__ == module:
            return method
    known = [one.__name__ for method in methods for one in method.classes]
    if named is not None:
        check_name(card.path, 'component', named, known)
    raise ValueError(
        f'configs/{card.folder} is named like no loss. Say in {card.path} '
        f'whose docstring tells the method: "Family: {card.family}, by '
        f'…Term."'
    )


def _types_of(
    cards: list[Card], methods: list[Method], method: Method
) -> list[str]:
    """Names of what is the method's own, its teller first."""
    used = {kind for card in cards for kind in card.types}
    names = [one.__name__ for one in method.classes]
    names += [
        one.__name__
        for other in methods
        for one in other.classes
        if other.paper()[1] and other.paper() == method.paper()
    ]
    return [name for name in dict.fromkeys(names) if name in used]


def own_layers(path: Path) -> tuple[str, int]:
    """Convolutions and parameters that a config's terms bring with them.

    Args:
        path: The config. Its terms are built as they are for its pair of
            detectors.

    Returns:
        The convolutions in words, and the number of weights.
    """
    model = read_config(path).model
    terms = model.get('terms', {})
    if LATE & {str(one.type).removeprefix('mmkd.') for one in terms.values()}:
        init_default_scope('mmdet')
        modules = [DETECTORS.build(model).terms]
    else:
        modules = [build(one, f'terms.{name}') for name, one in terms.items()]
    kernels = Counter(
        f'{layer.kernel_size[0]}×{layer.kernel_size[1]}'
        for module in modules
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    )
    words = [f'{count} of {size}' for size, count in sorted(kernels.items())]
    parameters = sum(
        one.numel() for module in modules for one in module.parameters()
    )
    return ', '.join(words) or 'none', parameters


def _published(card: Card, link: str, folder: str) -> str:
    """A pair, and its gain as it was published."""
    variant = '' if card.variant == folder else f'{card.variant}, '
    pair = f'[{variant}{card.student} from {card.teacher}]({link})'
    if card.published is None:
        return f'{pair}: none known'
    if card.base is None:
        return f'{pair}: {card.published}, for another student'
    gain = card.published - card.base
    return f'{pair}: {card.base} → {card.published} ({gain:+.1f})'


def methods_page(rows: list[Row]) -> str:
    """The text of ``docs/methods.md``."""
    families = '\n'.join(
        f'- *{name}*: {about}' for name, about in FAMILIES.items()
    )
    table = [
        '| method | family | paper | detectors | convolutions | parameters '
        '| published AP, alone → distilled | configs |',
        '|' + '---|' * 8,
    ]
    parts = ['| method | family | paper | type |', '|---|---|---|---|']
    for row in rows:
        link = f'[{row.title}](method_cards.md#{anchor(row.method.title)})'
        if not row.folder:
            types = ', '.join(f'`{name}`' for name in row.types)
            cells = (link, row.family, row.source, types)
            parts.append(f'| {" | ".join(cells)} |')
            continue
        published = [
            _published(card, f'../{card.path}', row.folder)
            for card in row.configs
        ]
        cells = (
            link,
            row.family,
            row.source,
            row.detectors,
            row.layers,
            _count(row.parameters),
            '<br>'.join(published),
            f'[{row.folder}](../configs/{row.folder}/README.md)',
        )
        table.append(f'| {" | ".join(cells)} |')
    page = [
        '# Methods',
        '<!-- Generated by tools/make_docs.py; edit the cards. -->',
        'What there is, what it costs, and what its authors or others report '
        'for COCO. A family is what a method compares:',
        families,
        '*Convolutions* and *parameters* are those that the terms of the '
        "method's first config train beside the student, and that are left "
        'behind after the training; the teacher comes on top and runs as far '
        'as the terms ask. *Published* numbers are of their sources, with '
        'their detectors, schedules and teachers; what the config changes, '
        'and where the number is from, stands on its card. None of them is a '
        'result of ours; these are in [Results](results.md).',
        '\n'.join(table),
        'Without a published config of their own:',
        '\n'.join(parts),
        'Not here: LAD ([arXiv:2108.10520](https://arxiv.org/abs/2108.10520)) '
        "replaces the student's label assignment by the teacher's, and so the "
        "student's own loss, which mmkd adds terms to and never changes. "
        'MMDetection has it, for PAA, as its detector `LAD`.',
    ]
    return '\n\n'.join(page) + '\n'


def _count(number: int) -> str:
    """A number of weights in words.

    Example:
        >>> _count(5_900_000), _count(1536), _count(0)
        ('5.9 M', '1.54 k', 'none')
    """
    for unit, size in (('M', 1e6), ('k', 1e3)):
        if number >= size:
            return f'{number / size:.3g} {unit}'
    return str(number) if number else 'none'


def method_table(rows: list[Row]) -> str:
    """The README's table: the same rows by family, fewer columns."""
    lines = [
        '| method | the idea | source | type | configs |',
        '|' + '---|' * 5,
    ]
    families = list(FAMILIES)
    before = None
    for row in sorted(rows, key=lambda row: families.index(row.family)):
        if row.family != before:
            before = row.family
            lines.append(f'| **{before}** | *{FAMILIES[before]}* | | | |')
        link = f'[{row.folder}](configs/{row.folder})' if row.folder else ''
        cells = (
            f'[{row.title}](docs/method_cards.md#{anchor(row.method.title)})',
            _cell(markdown(row.about)),
            row.source,
            ', '.join(f'`{name}`' for name in row.types),
            link,
        )
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def folder_page(row: Row) -> str:
    """The text of ``configs/<method>/README.md``."""
    source = row.citation
    paper = (
        f'[{source["title"]}]({row.paper[1]}), '
        f'{source["authors"]}, {row.paper[0]}'
        if source
        else f'Source: {row.source}.'
    )
    card = f'../../docs/method_cards.md#{anchor(row.method.title)}'
    table = [
        '| student | teacher | student alone | published | trained by us '
        '| config |',
        '|' + '---|' * 6,
    ]
    for one in row.configs:
        cells = (
            one.student,
            f'{one.teacher} ({one.teacher_ap})'
            if one.teacher_ap
            else one.teacher,
            str(one.alone),
            _cell(_plain(one.fields['Published'])),
            _cell(_plain(one.fields['Trained by us'])),
            f'[config](./{"/".join(Path(one.path).parts[2:])})',
        )
        table.append(f'| {" | ".join(cells)} |')
    parts = [
        f'# {row.title}',
        '<!-- Generated by tools/make_docs.py; edit cards and docstrings. -->',
        paper,
        '## Abstract',
        markdown(row.about),
        f'A method of the family *{row.family}*; its terms bring '
        f'convolutions: {row.layers}; parameters: {_count(row.parameters)}. '
        f'Formula, settings and where we deviate from the authors: '
        f'[its card]({card}).',
        '## Results',
        'Box AP on COCO. Published numbers are those of their sources.',
        '\n'.join(table),
    ]
    if row.tiny:
        names = [Path(one).stem for one in row.tiny]
        command = f'python tools/test_all.py {" ".join(names)}'
        parts += [
            '## In a minute, on a CPU',
            f'```bash\n{command}\n```',
            'trains '
            + ', '.join(
                f'[{Path(one).stem}](./tiny/{Path(one).name})'
                for one in row.tiny
            )
            + ' on generated pictures; see '
            '[Tiny trainings](../../docs/tiny.md).',
        ]
    if source:
        parts += ['## Citation', f'```bibtex\n{bibtex(source)}\n```']
    return '\n\n'.join(parts) + '\n'


def bibtex(source: dict[str, str]) -> str:
    """An entry of what :meth:`Method.citation` found.

    Example:
        >>> print(
        ...     bibtex(
        ...         dict(
        ...             authors='Du et al.',
        ...             title='T',
        ...             venue='',
        ...             year='',
        ...             address='arXiv:2111.00674',
        ...         )
        ...     )
        ... )
        @misc{du2021t,
          author = {Du and others},
          title = {{T}},
          year = {2021},
          eprint = {2111.00674},
          archivePrefix = {arXiv}
        }
    """
    number = source['address'].removeprefix('arXiv:')
    arxiv = number != source['address']
    year = source['year'] or f'20{number[:2]}'
    name = re.match(r'[\w-]+', source['authors'])[0].lower()
    word = re.search(r'\w+', source['title'])[0].lower()
    fields = dict(
        author=source['authors'].replace('et al.', 'and others'),
        title=f'{{{source["title"]}}}',
    )
    if source['venue']:
        fields['booktitle'] = source['venue']
    fields['year'] = year
    if arxiv:
        fields |= dict(eprint=number, archivePrefix='arXiv')
    else:
        fields['url'] = source['address']
    kind = 'inproceedings' if source['venue'] else 'misc'
    lines = [f'  {key} = {{{value}}}' for key, value in fields.items()]
    return f'@{kind}{{{name}{year}{word},\n' + ',\n'.join(lines) + '\n}'


def metafile(row: Row) -> str:
    """The text of ``configs/<method>/metafile.yml``."""
    source = row.citation
    collection: dict[str, Any] = {
        'Name': row.title,
        'Metadata': {
            'Training Data': 'COCO',
            'Training Techniques': ['Knowledge distillation'],
            'Architecture': sorted({one.detector for one in row.configs}),
        },
        'README': f'configs/{row.folder}/README.md',
    }
    if source:
        collection['Paper'] = {
            'Title': source['title'],
            'URL': row.paper[1],
        }
    models = [
        {
            'Name': Path(one.path).stem,
            'In Collection': row.title,
            'Config': one.path,
            'Metadata': {
                'Student': one.student,
                'Teacher': one.teacher,
                'Epochs': one.epochs,
                'Box AP of the student alone': one.alone,
                'Box AP of the teacher': one.teacher_ap,
                'Published': one.fields['Published'],
                'Trained by us': one.fields['Trained by us'],
            },
        }
        for one in row.configs
    ]
    text = yaml.safe_dump(
        {'Collections': [collection], 'Models': models},
        sort_keys=False,
        allow_unicode=True,
        width=79,
    )
    return f'# Generated by tools/make_docs.py; edit the cards.\n{text}'


def model_index(rows: list[Row]) -> str:
    """The text of ``model-index.yml``."""
    lines = '\n'.join(
        f'  - configs/{row.folder}/metafile.yml' for row in rows if row.folder
    )
    return (
        '# Generated by tools/make_docs.py. MMEngine looks here before it '
        'resolves\n# mmkd::folder/file.py, and takes the path as it stands '
        'where no metafile\n# lists it.\n'
        f'Import:\n{lines}\n'
    )


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
