import shutil
from pathlib import Path

import pytest
import tiny
from mmengine.config import Config

from mmkd.laboratory import digests
from mmkd.laboratory.runs import PACKAGE


def settings(loss):
    term = dict(type='mmkd.FeatureTerm', teacher='big', loss=dict(type=loss))
    return Config(
        dict(model=tiny.distilled(tiny.retinanet(), dict(), dict(one=term)))
    )


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A copy of the package, of which one file can be edited."""
    copy = tmp_path / 'mmkd'
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns('.mim', '__pycache__')
    )

    def digest_of(config, file=None, old='', new=''):
        if file is not None:
            path = copy / file
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, 1))
        for cached in (digests._imports, digests._tree, digests._meaning):
            cached.cache_clear()
        monkeypatch.setattr(digests, 'PACKAGE', copy)
        monkeypatch.setattr(
            digests,
            '_file_of',
            lambda kind: moved(kind, copy),
        )
        return digests.code_digest(config)

    yield digest_of
    for cached in (digests._imports, digests._tree, digests._meaning):
        cached.cache_clear()


_real = digests._file_of


def moved(kind, copy):
    digests.PACKAGE = PACKAGE
    path = _real(kind)
    digests.PACKAGE = copy
    return None if path is None else copy / path.relative_to(PACKAGE)


def test_a_changed_loss_changes_the_digest_of_its_method(edited):
    before = edited(settings('mmkd.PKDLoss'))
    after = edited(
        settings('mmkd.PKDLoss'),
        'losses/pkd.py',
        'F.mse_loss(student, teacher) / 2',
        'F.mse_loss(student, teacher)',
    )
    assert before != after


def test_and_leaves_that_of_others(edited):
    before = edited(settings('mmkd.CWDLoss'))
    after = edited(settings('mmkd.CWDLoss'), 'losses/pkd.py', ') / 2', ') / 3')
    assert before == after


def test_what_a_loss_imports_counts(edited):
    before = edited(settings('mmkd.PKDLoss'))
    after = edited(
        settings('mmkd.PKDLoss'),
        'ops/numeric.py',
        'dim=(0, 2, 3), correction=0',
        'dim=(0, 2, 3), correction=1',
    )
    assert before != after


def test_comments_and_docstrings_do_not_count(edited):
    before = edited(settings('mmkd.PKDLoss'))
    after = edited(
        settings('mmkd.PKDLoss'),
        'losses/pkd.py',
        '"""PKD: imitate',
        '# a remark\n"""PKD: let the student imitate',
    )
    assert before == after


def test_plain_training_does_not_depend_on_terms(edited):
    plain = Config(dict(model=tiny.retinanet()))
    before = edited(plain)
    assert before == edited(
        plain, 'terms/feature.py', 'self.joint', 'self._joint'
    )
    assert before != edited(
        plain, 'engine/draws.py', '_END = object()', '_END = 1'
    )


@pytest.mark.parametrize(
    ('place', 'kind', 'file'),
    [
        ('custom_hooks', 'DiagnosticsHook', 'engine/diagnostics.py'),
        (
            'batch_sampler',
            'PartlyLabelledBatchSampler',
            'datasets/photographs.py',
        ),
        ('pipeline', 'DropLabels', 'datasets/photographs.py'),
        ('dataset', 'HypothesisDataset', 'datasets/hypotheses.py'),
    ],
)
def test_components_of_every_kind_count(place, kind, file):
    """Samplers, hooks and transforms as well as losses and data sets."""
    plain = Config(dict(model=tiny.retinanet()))
    config = Config(dict(plain, **{place: [dict(type=f'mmkd.{kind}')]}))
    assert file in set(digests.sources(config)) - set(digests.sources(plain))


def test_the_seed_is_not_part_of_a_configs_digest():
    one, other = (
        Config(dict(model=dict(type='FCOS'), randomness=dict(seed=seed)))
        for seed in (0, 1)
    )
    assert digests.config_digest(one) == digests.config_digest(other)
    other.model.depth = 18
    assert digests.config_digest(one) != digests.config_digest(other)


def test_annotations_and_images_decide_the_datas_digest(tmp_path):
    for split in ('train', 'test'):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'a.png').write_bytes(b'12')
        (tmp_path / f'{split}.json').write_text('{}')

    def digest():
        digests.file_digest.cache_clear()
        loader = {
            f'{split}_dataloader': dict(
                dataset=dict(
                    data_root=str(tmp_path),
                    ann_file=f'{split}.json',
                    data_prefix=dict(img=f'{split}/'),
                )
            )
            for split in ('train', 'test')
        }
        return digests.data_digest(Config(loader))

    before = digest()
    assert digest() == before
    Path(tmp_path, 'train', 'b.png').write_bytes(b'1')
    after = digest()
    assert after['train'] != before['train']
    assert after['test'] == before['test']
    Path(tmp_path, 'test.json').write_text('{"images": []}')
    assert digest()['test'] != before['test']
