"""What the generated pages say of the methods, and where they get it from."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def load():
    spec = importlib.util.spec_from_file_location(
        'make_docs', ROOT / 'tools' / 'make_docs.py'
    )
    tool = importlib.util.module_from_spec(spec)
    sys.modules['make_docs'] = tool
    spec.loader.exec_module(tool)
    return tool


docs = load()
FOLDERS = sorted(
    {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / 'configs').rglob('*_coco.py')
    }
)

CARDS = docs.read_configs(ROOT / 'configs')
FAMILY = {one.folder: one.family for one in CARDS if 'Family' in one.fields}


def card(
    published='43.7 AP, the README.',
    title='CrossKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).',
    name='crosskd_gfl_r50-from-r101_fpn_1x_coco.py',
):
    fields = {
        'Published': published,
        'Trained by us': 'no.',
        'Schedule': '24 epochs of 16 images a step.',
    }
    return docs.Card(f'configs/crosskd/{name}', title, fields, set())


def test_examples_of_the_docstrings_hold():
    assert doctest.testmod(docs).failed == 0


# What no docstring says ------------------------------------------------------


@pytest.mark.parametrize('folder', FOLDERS)
def test_one_card_of_a_folder_says_its_family(folder):
    said = [
        one for one in CARDS if one.folder == folder and 'Family' in one.fields
    ]
    assert len(said) == 1, f'{[one.path for one in said]}'
    assert said[0].family in docs.FAMILIES


def test_parts_are_methods_that_there_are():
    titles = {
        one.title
        for _, package, _ in docs.KINDS
        for one in docs.read_methods(package)
    }
    assert set(docs.PARTS) <= titles
    assert set(docs.PARTS.values()) <= set(docs.FAMILIES)


def test_a_part_without_a_family_is_told_what_to_write():
    with pytest.raises(
        ValueError, match='New is a method that no .* PARTS of'
    ):
        docs._family_of_part('New')


@pytest.mark.parametrize(
    ('said', 'family', 'by'),
    [
        ('focal region.', 'focal region', None),
        ('query, by MemoryTerm.', 'query', 'MemoryTerm'),
    ],
)
def test_a_card_says_its_family_and_who_tells_the_method(said, family, by):
    one = card()
    one.fields['Family'] = said
    assert (one.family, one.told_by) == (family, by)


@pytest.mark.parametrize('said', ['', 'quary.', 'query', 'query by X.'])
def test_a_family_that_is_none_is_told_what_to_write(said):
    one = card()
    one.fields['Family'] = said
    with pytest.raises(ValueError, match='crosskd_gfl.*"Family: NAME, by'):
        _ = one.family


def test_the_component_that_tells_a_method_is_found():
    methods = [
        *docs.read_methods('mmkd.losses'),
        *docs.read_methods('mmkd.terms'),
    ]
    one = card()
    one.fields['Family'] = 'response, by CrossHeadTerm.'
    assert docs._teller(one, methods).classes[0].__name__ == 'CrossHeadTerm'
    one.fields['Family'] = 'response, by CrossHedTerm.'
    with pytest.raises(ValueError, match="Did you mean 'CrossHeadTerm'"):
        docs._teller(one, methods)
    one.fields['Family'] = 'response.'
    with pytest.raises(ValueError, match='"Family: response, by …Term."'):
        docs._teller(one, methods)
    one.path = one.path.replace('crosskd', 'pkd')
    assert docs._teller(one, methods).title == 'PKD'


# Cards -----------------------------------------------------------------------


def test_a_card_is_taken_apart():
    one = card()
    assert one.folder == one.variant == 'crosskd'
    assert (one.student, one.teacher) == ('GFL R-50', 'R-101')
    assert (one.detector, one.alone, one.teacher_ap) == ('GFL', 40.2, '44.7')
    assert one.epochs == 24


def test_a_teacher_that_is_no_detector_has_no_ap():
    one = card(title='X: GFL R-50 (1.0 AP alone) learns from DINOv2 B/14.')
    assert (one.teacher, one.teacher_ap) == ('DINOv2 B/14', '')


def test_the_short_name_of_faster_r_cnn_is_spelt_out():
    title = 'X: {} R-50 (1.0 AP alone) learns from R-101 (2.0 AP).'
    for name in ('Faster', 'Faster R-CNN'):
        assert card(title=title.format(name)).detector == 'Faster R-CNN'


@pytest.mark.parametrize(
    ('text', 'published', 'base'),
    [
        ('43.7 AP, the README.', 43.7, 40.2),
        ('43.2 AP; their student alone has 40.1.', 43.2, 40.1),
        (
            '44.2 AP, for a student with 39.6 AP, not to be compared',
            44.2,
            39.6,
        ),
        ('42.7 AP, improved, so not to be compared with 38.5', 42.7, None),
        ('no result for this pair; another has 41.3 AP', None, 40.2),
    ],
)
def test_published_gain_is_over_the_same_source(text, published, base):
    one = card(text)
    assert one.published == published
    assert one.base == base


def test_gain_is_written_with_its_pair():
    link = '[GFL R-50 from R-101](x.py)'
    assert docs._published(card(), 'x.py', 'crosskd') == (
        f'{link}: 40.2 → 43.7 (+3.5)'
    )
    other = card('43.2 AP; their student alone has 40.1.')
    assert docs._published(other, 'x.py', 'crosskd') == (
        f'{link}: 40.1 → 43.2 (+3.1)'
    )
    assert docs._published(card('none'), 'x.py', 'crosskd') == (
        f'{link}: none known'
    )
    other = card('42.7 AP, not to be compared')
    assert docs._published(other, 'x.py', 'crosskd') == (
        f'{link}: 42.7, for another student'
    )
    other = card(name='crosskd-pkd_gfl_r50-from-r101_fpn_1x_coco.py')
    assert docs._published(other, 'x.py', 'crosskd').startswith(
        '[crosskd-pkd, GFL R-50'
    )


def test_a_missing_field_names_the_config():
    one = card()
    del one.fields['Published']
    with pytest.raises(ValueError, match=r"crosskd_gfl.*no 'Published'"):
        _ = one.published
    with pytest.raises(ValueError, match='first line must read'):
        _ = card(title='CrossKD.').student


def test_tiny_configs_and_bases_are_no_published_experiments():
    paths = [one.path for one in docs.read_configs(ROOT / 'configs')]
    assert paths
    assert not [path for path in paths if '/tiny/' in path]


# Cost and citation -----------------------------------------------------------


def test_cost_is_counted_in_the_terms_as_they_are_built():
    path = ROOT / 'configs' / 'mgd' / 'tiny' / 'mgd_tiny.py'
    # Three levels, each two 3x3 convolutions of 32 channels with biases.
    weights = 3 * 2 * (32 * 32 * 9 + 32)
    assert docs.own_layers(path) == ('6 of 3×3', weights)
    path = ROOT / 'configs' / 'pkd' / 'tiny' / 'pkd_tiny.py'
    assert docs.own_layers(path) == ('none', 0)


def test_citation_is_read_from_the_reference():
    (pkd,) = (
        one for one in docs.read_methods('mmkd.losses') if one.title == 'PKD'
    )
    source = pkd.citation()
    assert source['authors'] == 'Cao et al.'
    assert (source['venue'], source['year']) == ('NeurIPS', '2022')
    entry = docs.bibtex(source)
    assert entry.startswith('@inproceedings{cao2022pkd,')
    assert 'author = {Cao and others}' in entry
    assert 'eprint = {2207.02039}' in entry


def test_a_source_without_a_number_keeps_its_address():
    source = dict(
        authors='Zhang and Ma',
        title='A: B',
        venue='ICLR',
        year='2021',
        address='https://openreview.net/forum?id=x',
    )
    assert docs.bibtex(source) == (
        '@inproceedings{zhang2021a,\n'
        '  author = {Zhang and Ma},\n'
        '  title = {{A: B}},\n'
        '  booktitle = {ICLR},\n'
        '  year = {2021},\n'
        '  url = {https://openreview.net/forum?id=x}\n'
        '}'
    )


# The files -------------------------------------------------------------------


def rows_of(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    return [re.split(r'(?<!\\)\|', line)[1:-1] for line in lines]


def test_every_field_of_the_table_of_methods_is_filled():
    rows = rows_of('docs/methods.md')
    assert len(rows) > len(FOLDERS)
    assert [row for row in rows if not all(map(str.strip, row))] == []


@pytest.mark.parametrize('folder', FOLDERS)
def test_readme_and_table_have_every_folder(folder):
    for page in ('README.md', 'docs/methods.md'):
        assert re.search(
            rf'\[{folder}\]\(\S*configs/{folder}(/README\.md)?\)',
            (ROOT / page).read_text(encoding='utf-8'),
        ), f'{page} has no {folder}. Type: make docs'


def test_the_readme_lists_methods_below_their_family():
    family, listed = None, []
    for line in (ROOT / 'README.md').read_text('utf-8').splitlines():
        if found := re.match(r'\| \*\*(.+?)\*\* \|', line):
            family = found[1]
        elif found := re.search(r'\[([\w-]+)\]\(configs/\1\) \|$', line):
            assert FAMILY[found[1]] == family
            listed.append(found[1])
    assert sorted(listed) == FOLDERS


@pytest.mark.parametrize('folder', FOLDERS)
def test_metafile_lists_every_config_of_its_folder(folder):
    path = ROOT / 'configs' / folder / 'metafile.yml'
    found = yaml.safe_load(path.read_text(encoding='utf-8'))
    (collection,) = found['Collections']
    assert (ROOT / collection['README']).is_file()
    configs = sorted(model['Config'] for model in found['Models'])
    assert configs == sorted(
        one.relative_to(ROOT).as_posix()
        for one in path.parent.rglob('*_coco.py')
    )
    names = {model['In Collection'] for model in found['Models']}
    assert names == {collection['Name']}


def test_index_imports_every_metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert sorted(index['Import']) == [
        f'configs/{folder}/metafile.yml' for folder in FOLDERS
    ]


@pytest.mark.parametrize('folder', FOLDERS)
def test_page_of_a_folder_has_what_a_reader_looks_for(folder):
    page = ROOT / 'configs' / folder / 'README.md'
    text = page.read_text(encoding='utf-8')
    headings = re.findall('^#+ (.*)$', text, re.MULTILINE)
    assert headings[1:3] == ['Abstract', 'Results']
    assert 'In a minute, on a CPU' in headings
    cited = 'Source: ' not in text
    assert (headings[-1] == 'Citation') == cited
