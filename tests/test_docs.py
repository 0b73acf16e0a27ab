"""What the README and the pages in docs/ say is run and looked up.

Snippets marked ``python`` run in one namespace a page, in an empty folder.
A snippet whose first line is ``# name.py`` is a file of that name there, and
is imported. One that sets ``_base_`` is a config: it is read and its model is
built. Functions named ``test_…`` are called. Those marked ``python no-run``
are skipped, and counted below.
"""

import importlib.util
import re
import sys
from pathlib import Path

import mmdet.registry
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope

from mmkd import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted(ROOT.glob('*.md')),
        *sorted((ROOT / 'docs').glob('*.md')),
        *sorted((ROOT / 'configs').glob('*/README.md')),
    )
]
#: Snippets that are not run. Raise a number only with a reason.
SKIPPED = {
    # A fragment of a config, from a docstring.
    'docs/method_cards.md': 1,
    # Its file would be one that nobody should trust.
    'docs/reliability.md': 1,
}

#: Files that a page only supposes.
SUPPOSED = {'mmkd/losses/cosine.py'}

FENCE = re.compile(r'^```([^\n]*)\n(.*?)^```\s*$', re.DOTALL | re.MULTILINE)


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


def snippets(page, language):
    return [
        (tag.split(), code)
        for tag, code in FENCE.findall(read(page))
        if tag.split()[:1] == [language]
    ]


# Snippets --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder; what its files and pages register goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    scope = DefaultScope.get_current_instance()
    init_default_scope('mmdet')
    yield tmp_path
    if scope is not None:
        init_default_scope(scope.scope_name)
    own = {path.stem for path in tmp_path.glob('*.py')}
    own |= {Path(page).stem for page in PAGES}
    for one in (registry.MODELS, mmdet.registry.MODELS):
        for name, entry in list(one.module_dict.items()):
            if entry.__module__ in own:
                del one.module_dict[name]
    for name in own & set(sys.modules):
        del sys.modules[name]


class Page:
    """Runs the snippets of one page."""

    def __init__(self, name):
        self.names = {'__name__': Path(name).stem}
        self.tests = set()
        self.configs = 0

    def run(self, code, where):
        head = re.match(r'# ([\w.-]+\.py)\n', code)
        if '_base_ =' in code:
            self.build(head[1] if head else f'config_{self.configs}.py', code)
        elif head:
            Path(head[1]).write_text(code, encoding='utf-8')
            importlib.invalidate_caches()
            module = importlib.import_module(head[1].removesuffix('.py'))
            self.names.update(vars(module))
        else:
            exec(compile(code, where, 'exec', dont_inherit=True), self.names)
        for name, one in list(self.names.items()):
            if name.startswith('test_') and name not in self.tests:
                self.tests.add(name)
                one()

    def build(self, name, code):
        self.configs += 1
        Path(name).write_text(code, encoding='utf-8')
        config = Config.fromfile(name)
        model = mmdet.registry.MODELS.build(config.model)
        assert len(model.terms) > 0


@pytest.mark.parametrize('page', PAGES)
def test_snippets_run(page, folder):
    found = snippets(page, 'python')
    runs = [code for tags, code in found if 'no-run' not in tags]
    assert len(found) - len(runs) == SKIPPED.get(page, 0)
    running = Page(page)
    for number, code in enumerate(runs, 1):
        running.run(code, f'{page}, snippet {number}')


def test_adding_a_method_runs_its_own_tests(folder):
    """The page's tests are really called: a wrong loss fails one of them."""
    codes = [code for _, code in snippets('docs/adding_a_method.md', 'python')]
    loss = next(code for code in codes if code.startswith('# cosine.py'))
    test = next(code for code in codes if code.startswith('# test_cosine.py'))
    page = Page('docs/adding_a_method.md')
    page.run(loss.replace('dim=1', 'dim=2'), 'a wrong loss')
    with pytest.raises(AssertionError):
        page.run(test, 'its test')


def test_own_method_of_the_readme_has_about_forty_lines():
    if not (ROOT / 'README.md').is_file():
        pytest.skip('there is no README.md')
    codes = [code for _, code in snippets('README.md', 'python')]
    own = next(code for code in codes if 'register_module' in code)
    assert len(own.splitlines()) <= 45


# Links -----------------------------------------------------------------------


def headings(page):
    text = FENCE.sub('', read(page))
    found = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {
        re.sub(r'[^\w\- ]', '', one.lower()).replace(' ', '-') for one in found
    }


@pytest.mark.parametrize('page', PAGES)
def test_relative_links_resolve(page):
    text = FENCE.sub('', read(page))
    links = re.findall(r'\[[^\]]*\]\(([^)\s]+)\)', text)
    broken = []
    for link in links:
        if re.match(r'\w+:', link):
            continue
        path, _, part = link.partition('#')
        target = ((ROOT / page).parent / path).resolve() if path else None
        if target is not None and not target.exists():
            broken.append(link)
        elif part and (target is None or target.suffix == '.md'):
            where = target or ROOT / page
            if part not in headings(where.relative_to(ROOT).as_posix()):
                broken.append(link)
    assert broken == []


# Commands --------------------------------------------------------------------


def commands(page):
    """Lines of shell blocks, and what stands between backticks."""
    text = read(page)
    for tag, code in FENCE.findall(text):
        if tag.split()[:1] in (['bash'], ['sh'], ['console']):
            yield from code.splitlines()
    yield from re.findall(r'`([^`]+)`', FENCE.sub('', text))


def targets():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    return set(re.findall(r'^([\w-]+):(?!=)', makefile, re.MULTILINE))


@pytest.mark.parametrize('page', PAGES)
def test_commands_that_are_named_exist(page):
    missing = []
    for command in commands(page):
        command = ' '.join(command.split())
        if re.match(r'make [a-z]', command):
            missing += {command.split()[1]} - targets()
        missing += [
            path
            for path in re.findall(
                r'(?:^| )((?:tools|demo|configs|tests|mmkd)/[\w./-]+\.\w+)',
                command,
            )
            if not (ROOT / path).exists() and path not in SUPPOSED
        ]
    assert missing == []


@pytest.mark.parametrize('page', PAGES)
def test_packaged_configs_that_are_named_exist(page):
    folder = Path(mmdet.registry.__file__).parent / '.mim' / 'configs'
    named = set(re.findall(r'mmdet::([\w./-]+\.py)', read(page)))
    named.discard('folder/file.py')
    assert [one for one in named if not (folder / one).is_file()] == []


# Generated texts -------------------------------------------------------------


def test_generated_texts_are_up_to_date(capsys):
    spec = importlib.util.spec_from_file_location(
        'make_docs', ROOT / 'tools' / 'make_docs.py'
    )
    tool = importlib.util.module_from_spec(spec)
    sys.modules['make_docs'] = tool
    spec.loader.exec_module(tool)
    status = tool.main(['--check'])
    assert status == 0, capsys.readouterr().err
