import base64
import csv
import json
import math
import re
from html.parser import HTMLParser

import mmcv
import numpy as np
import pytest

from mmkd.analysis import report
from mmkd.analysis.curves import Interval, bands, intervals
from mmkd.analysis.page import (
    Cell,
    Code,
    Heading,
    Table,
    Text,
    as_html,
    as_markdown,
)
from mmkd.analysis.report import (
    Case,
    diff,
    draw_cases,
    headline,
    write_report,
)
from mmkd.analysis.verdict import judge, summarise

VOID = {'meta', 'img', 'source', 'br', 'link'}


def metrics(ap, **others):
    found = dict(AP=ap, AP50=ap + 20, AP75=ap + 1, APs=math.nan, APm=None)
    return found | dict(by_class=dict(disc=ap + 2, ring=ap - 2)) | others


def arm(name, title, kind, scores, method=None, iterations=600, **others):
    runs = [
        dict(
            seed=seed,
            status='done',
            reason=None,
            metrics=metrics(score),
            curve=[[300, score - 5], [iterations, score]],
            seconds=60.0,
            diagnostics=[],
        )
        for seed, score in enumerate(scores)
    ]
    return (
        dict(
            name=name,
            title=title,
            kind=kind,
            method=method,
            step_ratio=1.0,
            iterations=iterations,
            runs=runs,
        )
        | others
    )


def comparison(against, mean, low, high, **others):
    return (
        dict(
            arm='pkd',
            against=against,
            differences={'0': mean - 0.25, '1': mean + 0.25},
            mean=mean,
            low=low,
            high=high,
            sd=0.354,
            n=2,
            wins=2,
            losses=0,
            sign_p=0.5,
            p=0.012,
            p_holm=0.024,
            bootstrap=dict(low=low - 0.11, high=high + 0.11, draws=1000),
            gap_closed=None,
        )
        | others
    )


def results(seeds=2):
    """The student gains 10 AP, of which 6.5 remain in equal time."""
    gap = dict(mean=0.25, low=0.21, high=0.29)
    base = np.arange(seeds) - (seeds - 1) / 2  # mean 0
    arms = [
        arm('alone', 'student alone', 'alone', 20 + base),
        arm('long', 'alone, longer', 'time', 23.5 + base, None, 822),
        arm('pkd', 'PKD', 'distilled', 30 + base, 'pkd', step_ratio=1.37),
        arm('pkd_sham', 'PKD, sham', 'sham', 22 + base, 'pkd'),
    ]
    return dict(
        title='Shapes',
        note='A synthetic set.',
        command='python tools/compare.py shapes.py',
        metric='AP',
        teacher=dict(
            title='R-18',
            metrics=metrics(60.0),
            validation=58.0,
            parameters=5_312_345,
            gflops=1.234,
            config='teacher.py',
            checkpoint_sha256='c0ffee',
        ),
        student=dict(parameters=160_321, gflops=0.31, config='student.py'),
        seeds=list(range(seeds)),
        arms=arms,
        comparisons=[
            comparison('alone', 10.0, 9.1, 10.9, gap_closed=gap),
            comparison('long', 6.5, 5.6, 7.4),
            comparison('pkd_sham', 8.0, 7.1, 8.9),
        ],
        ranking=[['pkd']],
        data=dict(
            name='shapes', test_images=600, sha256={'test.json': 'beef'}
        ),
        versions=dict(mmkd='1.0', torch='2.4.1'),
        machine='a laptop',
        hashes=dict(code='aaaa', config='bbbb'),
        stale=[],
    )


def last(points):
    return points[-1, 1]


def compared(results, against, **changed):
    (one,) = (x for x in results['comparisons'] if x['against'] == against)
    one.update(changed)
    return results


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
        elif tag == 'small':
            self.tables[-1][-1][-1] += ' | '

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        data = data.replace('\xa0', ' ')
        if 'style' not in self.open:
            self.words.append(data)
        if {'td', 'th'} & set(self.open):
            self.tables[-1][-1][-1] += data

    def row(self, table, name):
        """By the head's names, the cells of a table's row."""
        head, *rows = self.tables[table]
        (row,) = (row for row in rows if row[0] == name)
        return dict(zip(head, row))


def written(results, folder):
    """Markdown, and the page that a browser sees."""
    files = write_report(results, folder)
    return (
        files['report.md'].read_text(encoding='utf-8'),
        Page(files['report.html'].read_text(encoding='utf-8')),
    )


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures, for those who look at the words alone."""
    monkeypatch.setattr(report, 'draw_pictures', lambda *_: {})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    write_report(results(), folder)
    return folder


@pytest.fixture(scope='module')
def page(folder):
    return Page((folder / 'report.html').read_text(encoding='utf-8'))


def test_main_table_has_each_number_in_its_column(page):
    row = page.row(0, 'PKD')
    assert row['AP, mean ± SD'] == '30.0 ± 0.7'
    assert row['AP50'] == '50.0'
    assert row['AP75'] == '31.0'
    assert row['to alone'] == '+10.0 | +9.1 to +10.9'
    assert row['to equal time'] == '+6.5 | +5.6 to +7.4'
    assert row['gap closed'] == '25 % | 21 to 29'
    assert row['iterations'] == '600'
    assert row['time of a step'] == '1.37×'
    assert row['seeds'] == '2'
    assert page.row(0, 'R-18 | teacher')['AP, mean ± SD'] == '60.0'
    assert page.row(0, 'alone, longer')['iterations'] == '822'


def test_every_seed_and_class_has_its_number(page):
    seeds = page.row(1, 'PKD')
    assert (seeds['seed 0'], seeds['seed 1']) == ('29.5', '30.5')
    assert (seeds['mean'], seeds['SD']) == ('30.0', '0.7')
    assert page.row(2, 'PKD') == dict(arm='PKD', disc='32.0', ring='28.0')


def test_statistics_stand_beside_their_comparison(page):
    head, alone, time, _ = page.tables[3]
    row = dict(zip(head, time))
    assert row['against'] == 'alone, longer'
    assert (row['n'], row['mean'], row['SD']) == ('2', '+6.50', '0.35')
    assert row['95 % interval'] == '+5.60 to +7.40'
    assert row['won:lost'] == '2:0'
    assert (row['sign test p'], row['t test p']) == ('0.500', '0.012')
    assert row['Holm p'] == '0.024'
    assert row['bootstrap'] == '+5.49 to +7.51'
    assert alone[1] == 'student alone'
    assert page.tables[4][1][2:] == ['+9.75', '+10.25']


def test_markdown_has_the_rows_of_the_page(folder, page):
    text = (folder / 'report.md').read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len(lines) == sum(len(table) + 1 for table in page.tables)
    assert (
        '| **PKD** | 30.0 ± 0.7 | 50.0 | 31.0 | +10.0 (+9.1 to +10.9) '
        '| +6.5 (+5.6 to +7.4) | 25 % (21 to 29) | 600 | 1.37× | 2 |' in lines
    )
    assert '- **PKD: helps.** +6.5 AP against the student alone' in text
    assert '![AP over the iterations, by method](curves.png)' in text


def test_sections_stand_in_the_order_of_a_reader(folder):
    text = (folder / 'report.md').read_text(encoding='utf-8')
    assert re.findall('^#+ (.*)$', text, re.MULTILINE) == [
        'Shapes',
        'Results',
        'Training',
        'Every seed',
        'By class',
        'Statistics',
        'Differences of each seed',
        'Ranking',
        'Settings',
    ]
    assert text.index('PKD helps') < text.index('## Results')


def test_csv_has_a_row_for_each_arm_and_seed(folder):
    with (folder / 'results.csv').open(encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    (row,) = (x for x in rows if (x['arm'], x['seed']) == ('pkd', '1'))
    assert (row['kind'], row['method'], row['status']) == (
        'distilled',
        'pkd',
        'done',
    )
    numbers = ('AP', 'AP50', 'AP/disc', 'step_ratio', 'seconds')
    assert [float(row[name]) for name in numbers] == [
        30.5,
        50.5,
        32.5,
        1.37,
        60,
    ]
    assert (row['APs'], row['APm']) == ('', '')


def test_json_is_the_dict_with_null_for_what_does_not_exist(folder):
    text = (folder / 'results.json').read_text(encoding='utf-8')
    assert 'NaN' not in text
    found = json.loads(text)
    expected = results()
    assert found['arms'][2]['runs'][0]['metrics']['APs'] is None
    assert found['comparisons'] == expected['comparisons']
    assert found.keys() == expected.keys()


def test_settings_tell_how_to_repeat_it(page):
    words = ' '.join(page.words)
    for one in (
        'python tools/compare.py shapes.py',
        '5.31 M parameters, 1.23 GFLOPs',
        'checkpoint sha256 c0ffee',
        'shapes, 600 images to test on',
        'test.json sha256 beef',
        'mmkd 1.0, torch 2.4.1',
        'a laptop',
        'code aaaa',
        '8.0 min in all',
    ):
        assert one in words


def test_page_loads_nothing(folder, page):
    for tag, attrs in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'base')
        for name in ('src', 'srcset'):
            assert attrs.get(name, 'data:').startswith('data:')
    text = (folder / 'report.html').read_text(encoding='utf-8')
    assert not re.search(r'https?://|url\(|@import', text)


def test_page_contains_its_pictures(folder, page):
    sources = [attrs['src'] for tag, attrs in page.tags if tag == 'img']
    pictures = [base64.b64decode(one.split(',')[1]) for one in sources]
    assert pictures == [
        (folder / name).read_bytes() for name in ('gains.png', 'curves.png')
    ]
    # Others, for a narrow page.
    assert sum(tag == 'source' for tag, _ in page.tags) == 2


def test_titles_are_text_and_never_markup(tmp_path, undrawn):
    some = results()
    some['title'] = 'A <b>bold</b> & "quoted" title'
    some['arms'][2]['title'] = '<b>PKD</b> | *fast*'
    text, page = written(some, tmp_path)
    assert 'b' not in {tag for tag, _ in page.tags}
    assert some['title'] in page.words
    assert '&lt;b>PKD&lt;/b> \\| \\*fast\\*' in text
    assert not re.search(r'<\w', text)


def test_what_does_not_exist_is_a_dash_and_never_nan(tmp_path, undrawn):
    some = compared(
        results(), 'long', low=None, high=math.nan, p=math.nan, sign_p=None
    )
    some['arms'][2]['runs'][0]['metrics']['by_class']['ring'] = math.nan
    some['arms'][2]['runs'][1]['metrics']['by_class']['ring'] = -1
    text, page = written(some, tmp_path)
    assert page.row(2, 'PKD')['ring'] == '–'
    row = page.tables[3][2]
    assert row[5] == '–'
    assert row[7:9] == ['–', '–']
    for words in (text, ' '.join(page.words)):
        assert not re.search(r'\b(nan|None|inf)\b', words, re.IGNORECASE)


def test_runs_that_do_not_count_are_named_and_left_out_of_means(
    tmp_path, undrawn
):
    some = results(seeds=4)
    runs = some['arms'][2]['runs']  # 28.5, 29.5, 30.5, 31.5
    runs[0].update(status='timed out', reason='after 900 s', metrics=None)
    runs[1].update(status='failed', reason=None, metrics=None)
    some['arms'][3]['runs'][3]['status'] = 'stale'
    del some['arms'][0]['runs'][2]
    text, page = written(some, tmp_path)
    line = (
        '4 of 16 runs are missing: alone seed 2 is missing; pkd seed 0 timed '
        'out (after 900 s); pkd seed 1 failed; pkd_sham seed 3 is stale.'
    )
    assert line in page.words
    assert line in text
    row = page.row(1, 'PKD')
    assert (row['seed 0'], row['seed 1']) == ('timed out', 'failed')
    assert row['mean'] == '31.0'
    assert page.row(1, 'PKD, sham')['seed 3'] == 'stale'
    assert page.row(1, 'student alone')['seed 2'] == 'missing'
    assert page.row(0, 'PKD')['seeds'] == '2 of 4'
    with (tmp_path / 'results.csv').open(encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert [x['status'] for x in rows if x['arm'] == 'alone'][2] == 'missing'


def test_report_of_runs_that_all_failed_says_so(tmp_path):
    some = results()
    for run in (run for one in some['arms'] for run in one['runs']):
        run.update(status='failed', metrics=None, curve=[])
    some['comparisons'] = []
    (tmp_path / 'curves.png').write_text('of an earlier report')
    text, page = written(some, tmp_path)
    assert 'PKD was not measured against the student alone' in text
    assert '8 of 8 runs are missing' in text
    assert not (tmp_path / 'curves.png').exists()
    assert page.row(0, 'PKD')['AP, mean ± SD'] == '–'


def test_stale_numbers_are_marked_before_the_verdict(tmp_path, undrawn):
    some = results() | dict(stale=['pkd.py changed'])
    text, _ = written(some, tmp_path)
    assert text.index('Stale: ') < text.index('PKD helps')
    assert 'pkd.py changed' in text


def test_results_without_arms_are_an_error(tmp_path):
    some = results()
    del some['arms']
    with pytest.raises(ValueError, match='there is no arms'):
        write_report(some, tmp_path)


def test_unknown_kind_of_an_arm_is_an_error(tmp_path):
    some = results()
    some['arms'][0]['kind'] = 'alon'
    with pytest.raises(ValueError, match="Did you mean 'alone'"):
        write_report(some, tmp_path)


GAIN = dict(mean=6.5, low=5.6, high=7.4, n=6)
NONE = dict(mean=0.4, low=-0.5, high=1.3, n=6)
HARM = dict(mean=-6.5, low=-7.4, high=-5.6, n=6)


def test_gain_in_equal_time_and_over_the_sham_helps():
    card = judge('PKD', GAIN, GAIN, GAIN)
    assert (card.word, card.figure, card.tone) == ('helps', '+6.5 AP', 'good')
    assert card.text == (
        'against the student alone in equal time (95 % interval +5.6 to +7.4, '
        '6 seeds); the interval excludes 0. It also beats its sham teacher '
        '(+6.5 AP, +5.6 to +7.4).'
    )


def test_interval_around_zero_shows_nothing():
    card = judge('PKD', NONE, NONE, NONE)
    assert (card.word, card.tone) == ('not shown', '')
    assert 'the interval includes 0' in card.text


def test_interval_below_zero_harms():
    card = judge('PKD', HARM, HARM, NONE)
    assert (card.word, card.figure, card.tone) == ('harms', '−6.5 AP', 'bad')
    assert 'the interval excludes 0' in card.text


def test_gain_that_longer_training_explains_is_not_shown():
    card = judge('PKD', NONE, GAIN, GAIN)
    assert card.word == 'not shown'
    assert (
        'It gains +6.5 AP (+5.6 to +7.4) on the student alone in as many '
        'iterations, but takes longer for them.' in card.text
    )


def test_gain_that_a_sham_teacher_gives_too_is_doubted():
    for sham, words in ((NONE, 'is not shown to beat'), (HARM, 'does better')):
        text = judge('PKD', GAIN, GAIN, sham).text
        assert words in text
        assert 'may not come from what the teacher knows' in text
    text = judge('PKD', GAIN, GAIN, None).text
    assert 'not compared with a sham teacher' in text


def test_gain_among_many_comparisons_must_survive_correction():
    card = judge('PKD', GAIN | dict(p_holm=0.071))
    assert card.word == 'not shown'
    assert 'excludes 0, but no longer after' in card.text
    assert 'p = 0.071' in card.text


def test_one_seed_shows_nothing():
    card = judge('PKD', dict(mean=6.5, low=None, high=None, n=1))
    assert card.word == 'not shown'
    assert 'one seed, which gives no interval' in card.text


def test_inherited_weights_are_told():
    text = judge('head', GAIN, inherits=True).text
    assert 'starts from weights of its teacher' in text


def test_one_sentence_sums_up_all_methods():
    cards = [
        judge('PKD', GAIN),
        judge('FGD', NONE),
        judge('CWD', NONE),
        judge('LD', HARM),
    ]
    assert summarise(cards) == (
        'PKD helps; FGD and CWD are not shown to help; LD harms, each '
        'against the student alone in equal time.'
    )
    assert headline(results()) == (
        'PKD helps: +6.5 AP against the student alone in equal time.'
    )


def test_methods_that_inherit_are_judged_like_others(tmp_path, undrawn):
    some = results()
    some['arms'][2]['kind'] = 'inherited'
    text, page = written(some, tmp_path)
    assert 'PKD helps' in text
    assert page.row(0, 'PKD')['to equal time'] == '+6.5 | +5.6 to +7.4'


def test_group_of_a_ranking_is_marked_as_not_separated(tmp_path, undrawn):
    some = results()
    some['arms'] += [arm('fgd', 'FGD', 'distilled', [20, 21], 'fgd')]
    some['ranking'] = [['pkd', 'fgd'], ['alone']]
    text, _ = written(some, tmp_path)
    assert '1. PKD, FGD (not separated)\n2. student alone' in text


def test_many_classes_stand_below_each_other(tmp_path, undrawn):
    some = results()
    many = {f'class {index}': 10.0 + index for index in range(20)}
    for run in (run for one in some['arms'] for run in one['runs']):
        run['metrics']['by_class'] = many
    _, page = written(some, tmp_path)
    assert len(page.tables[2]) > 20
    assert page.row(2, 'class 19')['PKD'] == '29.0'


def test_diagnostics_become_a_picture(tmp_path):
    some = results()
    for run in some['arms'][2]['runs']:
        run['diagnostics'] = [
            dict(iteration=100, cosine=0.1, loss_share=math.nan),
            dict(iteration=200, cosine=0.2),
        ]
    files = write_report(some, tmp_path)
    assert mmcv.imread(files['diagnostics.png']) is not None
    assert '## Diagnostics' in files['report.md'].read_text(encoding='utf-8')


def test_cases_are_drawn_beside_each_other_and_shown(tmp_path):
    image = np.full((48, 64, 3), 128, np.uint8)
    box = [[10, 10, 30, 30]]
    found = box, [0.9], [0]
    case = Case(image, (box, None, [0]), found, found, found)
    picture = draw_cases([case, case], tmp_path / 'cases.png', ['disc'])
    height, width = mmcv.imread(picture).shape[:2]
    assert width == 4 * 320 + 5 * 8
    assert height == 30 + 2 * (240 + 8)
    some = results() | dict(cases=['a.png gains', 'b.png loses'])
    text, page = written(some, tmp_path)
    assert '![Test images with the boxes' in text
    assert '1. a.png gains; 2. b.png loses' in text
    images = [attrs for tag, attrs in page.tags if tag == 'img']
    assert len(images) == 3


def test_cases_of_earlier_results_are_not_shown(tmp_path):
    (tmp_path / 'cases.png').write_text('of an earlier report')
    files = write_report(results() | dict(cases=[]), tmp_path)
    assert 'cases.png' not in files


def test_diff_is_a_table_of_both_and_names_what_changed():
    one, other = results(), results()
    other['arms'][2]['runs'][1]['metrics']['AP'] = 29.5
    other['hashes'] = dict(code='cccc', config=dict(pkd='bbbb'))
    other['versions']['torch'] = '2.5.0'
    other['data']['sha256'] = {'test.json': 'dead'}
    text = diff(one, other)
    assert '| pkd | 30.00 (n = 2) | 29.50 (n = 2) | −0.50 | 1.00 |' in text
    assert '| alone | 20.00 (n = 2) | 20.00 (n = 2) | 0.00 | 0.00 |' in text
    assert '| teacher | 60.00 | 60.00 | 0.00 | – |' in text
    for line in (
        '- hash of code: aaaa → cccc',
        '- version of torch: 2.4.1 → 2.5.0',
        '- data test.json: beef → dead',
        '- hash of config of pkd: – → bbbb',
    ):
        assert line in text.splitlines()
    assert 'mmkd' in text.split('The same in both: ')[1]


def test_diff_of_the_same_results_changes_nothing():
    text = diff(results(), results())
    assert 'differ:' not in text
    assert '→' not in text


def test_diff_shows_an_arm_that_only_one_has():
    one, other = results(), results()
    del other['arms'][3], other['comparisons'][2]
    assert '| pkd_sham | 22.00 (n = 2) | – | – | – |' in diff(one, other)


def test_code_fence_is_longer_than_what_it_holds():
    text = as_markdown([Code('a\n```\nb')])
    assert text == '````\na\n```\nb\n````\n'


def test_blocks_are_the_same_in_both_forms():
    blocks = [
        Heading('A', 1),
        Text('b'),
        Table(['x', 'y'], [['1', Cell('2', 'detail')]]),
    ]
    assert as_markdown(blocks) == (
        '# A\n\nb\n\n| x | y |\n| :-- | --: |\n| 1 | 2 (detail) |\n'
    )
    page = Page(as_html('A', blocks))
    assert page.tables == [[['x', 'y'], ['1', '2 | detail']]]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, to be looked into."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', keep)
    return figures


def test_curves_have_a_panel_for_each_method_and_own_lengths(tmp_path, drawn):
    write_report(results(), tmp_path)
    (axis,) = next(
        figure.axes
        for figure in drawn
        if figure.axes[0].get_xlabel() == 'iteration'
    )
    names = [text.get_text() for text in axis.texts]  # ascending
    drawn = sorted((line.get_xydata() for line in axis.lines), key=last)
    lines = dict(zip(names, drawn))
    assert lines['distilled  30.0'].tolist() == [[300, 25], [600, 30]]
    assert lines['equal time  23.5'].tolist() == [[300, 18.5], [822, 23.5]]
    # Of the images that the curves are of, not of the test.
    assert lines['teacher  58.0'].tolist() == [[300, 58], [822, 58]]


def test_a_teacher_not_seen_on_the_images_of_the_curves_is_not_drawn(
    tmp_path, drawn
):
    found = results()
    found['teacher']['validation'] = None
    write_report(found, tmp_path)
    names = [x.get_text() for one in drawn for x in one.axes[0].texts]
    assert 'distilled  30.0' in names
    assert not [name for name in names if name.startswith('teacher')]


def test_band_reaches_from_the_lowest_run_to_the_highest(tmp_path, drawn):
    runs = [[(1, 10.0), (2, 20.0)], [(1, 14.0), (2, 22.0), (3, 90.0)]]
    bands({'a': {'x': runs}}, tmp_path / 'a.png')
    (axis,) = drawn[0].axes
    # 3 is left out: one run was not evaluated there.
    assert axis.lines[0].get_xydata().tolist() == [[1, 12], [2, 21]]
    (band,) = axis.collections
    corners = {tuple(xy) for xy in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 10), (1, 14), (2, 20), (2, 22)}


def test_a_name_has_one_colour_in_all_panels(tmp_path, drawn):
    line = [[(1, 1.0), (2, 2.0)]]
    panels = {'a': {'x': line, 'y': line}, 'b': {'y': line}}
    bands(panels, tmp_path / 'a.png')
    first, second = drawn[0].axes
    assert second.lines[0].get_color() == first.lines[1].get_color()


def test_line_without_a_shared_position_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='a/x'):
        bands({'a': {'x': [[(1, 1.0)], [(2, 1.0)]]}}, tmp_path / 'a.png')
    with pytest.raises(ValueError, match='no panel'):
        bands({}, tmp_path / 'a.png')


def test_interval_lies_where_its_ends_are(tmp_path, drawn):
    rows = {'alone': Interval(3.0, 1.0, 5.0, [2.0, 4.0])}
    intervals({'PKD': rows}, tmp_path / 'a.png')
    (axis,) = drawn[0].axes
    line, seeds, mean, zero = axis.lines
    assert list(line.get_xdata()) == [1, 5]
    assert list(seeds.get_xdata()) == [2, 4]
    assert list(mean.get_xdata()) == [3]
    assert list(zero.get_xdata()) == [0, 0]
    assert [text.get_text() for text in axis.texts] == ['PKD', '+3.0']
