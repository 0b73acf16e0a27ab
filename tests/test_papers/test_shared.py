"""What every one of the 21 papers must keep, from one table.

U1 to U7: the teacher stays as it is; the term alone teaches the backbone; the
exported student is the student; images without boxes, padding and half
precision are defined; without weight it is plain training; the paper's own
property; the teacher counts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rotation
import taught_by
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from taught_by import batch, counting, go_to, moment, own, shares, taught

from mmkd.configs import student_config
from mmkd.schedules import Constant

ROOT = Path(__file__).parents[2]
weights = taught_by.weights


@dataclass(frozen=True)
class Paper:
    """One row.

    Attributes:
        folder: Of its configs.
        arxiv: Its number.
        tests: Where its own property (U6) is tested.
        excused: Which of the shared tests cannot apply, and why.
        tiny: Its tiny config; named like the folder if None.
    """

    folder: str
    arxiv: str
    tests: str
    excused: dict[str, str] = field(default_factory=dict)
    tiny: str | None = None

    @property
    def path(self) -> Path:
        name = self.tiny or f'{self.folder}_tiny'
        return ROOT / 'configs' / self.folder / 'tiny' / f'{name}.py'


PAPERS = {
    'LSH': Paper('lsh', '2011.01424', 'test_losses/test_lsh.py'),
    'LSH of queries': Paper(
        'lsh',
        '2011.01424',
        'test_terms/test_query_feature.py',
        tiny='lsh-query_tiny',
    ),
    'MaKD': Paper('makd', '2604.03110', 'test_terms/test_multi_aspect.py'),
    'MaKD on queries': Paper(
        'makd',
        '2604.03110',
        'test_terms/test_multi_aspect_queries.py',
        tiny='makd-detr_tiny',
    ),
    'Residual KD': Paper(
        'residual-kd', '2002.09168', 'test_terms/test_residual.py'
    ),
    'Residual KD, joint': Paper(
        'residual-kd',
        '2002.09168',
        'test_terms/test_residual.py',
        tiny='residual-kd-joint_tiny',
    ),
    'SimKD': Paper(
        'simkd',
        '2203.14001',
        'test_terms/test_simkd.py',
        {'U5': "it begins with the teacher's head, plain training does not"},
    ),
    'SimKD with a decoder': Paper(
        'simkd',
        '2203.14001',
        'test_terms/test_simkd.py',
        {'U5': "it begins with the teacher's head, plain training does not"},
        tiny='simkd-query_tiny',
    ),
    'SSKD': Paper('sskd', '1812.01819', 'test_papers/test_sskd.py'),
    'SSKD of a DETR': Paper(
        'sskd',
        '1812.01819',
        'test_papers/test_sskd.py',
        tiny='sskd-query_tiny',
    ),
    'CMKD': Paper('cmkd', '2410.06561', 'test_losses/test_cmkd.py'),
    'CMKD of queries': Paper(
        'cmkd',
        '2410.06561',
        'test_terms/test_query_feature.py',
        tiny='cmkd-query_tiny',
    ),
    'CrossKD': Paper('crosskd', '2306.11369', 'test_terms/test_cross_head.py'),
    'CrossKD of queries': Paper(
        'crosskd',
        '2306.11369',
        'test_terms/test_cross_query.py',
        tiny='crosskd-query_tiny',
    ),
    'MHKD': Paper('mhkd', '2012.02911', 'test_terms/test_multi_head.py'),
    'MHKD of queries': Paper(
        'mhkd',
        '2012.02911',
        'test_terms/test_multi_head_query.py',
        tiny='mhkd-query_tiny',
    ),
    'UniKD': Paper('unikd', '2409.18565', 'test_terms/test_unified.py'),
    'DLKD': Paper('dlkd', '2012.00573', 'test_losses/test_dlkd.py'),
    'DLKD of queries': Paper(
        'dlkd',
        '2012.00573',
        'test_terms/test_query_feature.py',
        tiny='dlkd-query_tiny',
    ),
    'MLKD-BERT': Paper(
        'mlkd-bert', '2407.02775', 'test_terms/test_mlkd_bert.py'
    ),
    'MLKD-BERT on a pyramid': Paper(
        'mlkd-bert',
        '2407.02775',
        'test_terms/test_mlkd_bert.py',
        tiny='mlkd-bert-fpn_tiny',
    ),
    'MLKD-BERT on queries': Paper(
        'mlkd-bert',
        '2407.02775',
        'test_terms/test_mlkd_bert_queries.py',
        tiny='mlkd-bert-detr_tiny',
    ),
    'UHKD': Paper('uhkd', '2510.24116', 'test_losses/test_uhkd.py'),
    'ALP-KD': Paper('alp', '2012.14022', 'test_losses/test_alp.py'),
    'ALP-KD on queries': Paper(
        'alp',
        '2012.14022',
        'test_terms/test_alp_queries.py',
        tiny='alp-detr_tiny',
    ),
    'SemCKD': Paper('semckd', '2012.03236', 'test_losses/test_semckd.py'),
    'BackwardPass': Paper(
        'backward-pass', '2301.12006', 'test_terms/test_backward_pass.py'
    ),
    'BackwardPass of queries': Paper(
        'backward-pass',
        '2301.12006',
        'test_terms/test_backward_query.py',
        tiny='backward-pass-query_tiny',
    ),
    'FSP, of nine methods': Paper(
        'fsp', '2007.01922', 'test_losses/test_fsp.py'
    ),
    'BSS, of nine methods': Paper(
        'bss', '1805.05532', 'test_terms/test_boundary.py'
    ),
    'ONE, of nine methods': Paper(
        'one',
        '1806.04606',
        'test_terms/test_one.py',
        {'U1': 'it has no teacher', 'U7': 'it has no teacher'},
    ),
    'MHD': Paper(
        'mhd',
        '2507.21568',
        'test_datasets/test_hypotheses.py',
        {
            'U1': 'its teacher has spoken before, see test_papers/test_mhd.py',
            'U2': 'it has no term: its labels are what is distilled',
            'U3': 'its model is the plain student',
            'U4': 'it has no term: its losses are those of the detector',
            'U5': 'its model is the plain student',
            'U7': 'other weights are another file, see test_mhd.py',
        },
    ),
    'KD with integrated gradients': Paper(
        'ig', '2503.13008', 'test_datasets/test_attribution.py'
    ),
    'MMKD': Paper(
        'mmkd-meta', '2306.06634', 'test_terms/test_meta_teachers.py'
    ),
    'HPM-KD': Paper(
        'hpm-kd', '2512.09886', 'test_terms/test_teacher_attention.py'
    ),
    'P2P': Paper(
        'p2p',
        '2110.11023',
        'test_terms/test_peers.py',
        {
            'U1': 'its teacher learns as well',
            'U7': 'its teacher is a part of the term',
        },
    ),
    'P2P of queries': Paper(
        'p2p',
        '2110.11023',
        'test_terms/test_peers.py',
        tiny='p2p-query_tiny',
    ),
}


#: Some with each commit, all with the slow tests; the contracts of terms visit
#: every tiny config each time.
MARKS = rotation.marks([one.path for one in PAPERS.values()], count=6)


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(
            name,
            marks=[pytest.mark.xdist_group(f'paper {name}'), *MARKS[one.path]],
        )
        for name, one in PAPERS.items()
    ],
)
def paper(request):
    return PAPERS[request.param]


@pytest.fixture(scope='module')
def built(paper, weights):
    return taught(paper.path, weights)


@pytest.fixture
def student(paper, request, hub):
    """In the middle of a phase with terms; skipped where excused."""
    shared = request.function.__name__.split('_')[1].upper()
    if shared in paper.excused:
        pytest.skip(f'{shared}: {paper.excused[shared]}')
    built = request.getfixturevalue('built')
    go_to(hub, moment(built.phases))
    return copy.deepcopy(built)


def loaded(student, images, samples):
    """The batch as a data loader hands it over."""
    return tiny.pixels(images, samples)


def optimiser_of(student):
    learns = student.parameters()
    return OptimWrapper(torch.optim.SGD(learns, lr=0.01, momentum=0.9))


def test_u1_the_teacher_stays_as_it_is(student):
    before = [
        {key: one.clone() for key, one in one.detector.state_dict().items()}
        for one in student.teachers.values()
    ]
    student.train_step(loaded(student, *batch(student)), optimiser_of(student))
    for teacher, state in zip(student.teachers.values(), before):
        for key, one in teacher.detector.state_dict().items():
            assert torch.equal(one, state[key]), key
        assert all(one.grad is None for one in teacher.detector.parameters())


def test_u2_the_terms_alone_teach_the_backbone(student):
    sum(shares(student, *batch(student)).values()).backward()
    grads = [one.grad for one in student.backbone.parameters()]
    assert any(one is not None and one.abs().sum() > 0 for one in grads)


def test_u3_the_exported_student_is_the_student(student, paper):
    init_default_scope('mmdet')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        plain = MODELS.build(
            student_config(taught_by.read_config(paper.path).model)
        )
    state = {
        key: one
        for key, one in student.state_dict().items()
        if not key.startswith('terms.')
    }
    plain.load_state_dict(state)
    images, samples = batch(student)
    with torch.no_grad():
        found, wanted = (
            one.eval().predict(images, copy.deepcopy(samples))
            for one in (student, plain)
        )
    for one, other in zip(found, wanted):
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(
                one.pred_instances[key], other.pred_instances[key]
            )


@pytest.mark.parametrize('boxes', [0, 4])
@pytest.mark.parametrize('half', [False, True])
def test_u4_it_is_defined_without_boxes_and_in_half(student, boxes, half):
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        found = shares(student, *batch(student, boxes=boxes))
    sum(found.values()).backward()
    grads = [one.grad for one in student.parameters() if one.grad is not None]
    assert all(one.isfinite().all() for one in [*found.values(), *grads])


def test_u5_without_weight_it_is_plain_training(paper, weights, hub):
    if 'U5' in paper.excused:
        pytest.skip(f'U5: {paper.excused["U5"]}')
    go_to(hub, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        init_default_scope('mmdet')
        config = taught_by.tiny_model(paper.path, weights)
        config.pop('phases', None)
        for teacher in config.teachers.values():
            teacher.pop('inherit', None)  # it would start elsewhere
        students = []
        plain = student_config(copy.deepcopy(config))  # builds write into it
        for model in (config, plain):
            torch.manual_seed(0)
            student = MODELS.build(copy.deepcopy(model))
            student.init_weights()
            students.append(student.train())
    for term in students[0].terms.values():
        term.schedule = Constant(0.0)
    for student in students:
        optimiser = optimiser_of(student)
        torch.manual_seed(1)
        for seed in range(2):
            student.train_step(
                loaded(student, *batch(student, seed=seed)), optimiser
            )
    distilled, plain = (own(student) for student in students)
    assert len(distilled) == len(plain)
    for one, other in zip(distilled, plain):
        assert torch.equal(one, other)


def test_u6_its_own_property_is_tested(paper):
    text = (ROOT / 'tests' / paper.tests).read_text()
    assert text.count('\ndef test_') >= 4


def test_u7_the_teacher_counts(student):
    before = shares(copy.deepcopy(student), *batch(student))
    with torch.no_grad():
        for teacher in student.teachers.values():
            for one in teacher.detector.parameters():
                one.add_(0.1 * one.abs().mean() * torch.randn_like(one))
    after = shares(student, *batch(student))
    for name in counting(student):
        assert any(
            before[key] != after[key]
            for key in before
            if key.startswith(f'loss_kd_{name}')
        )


def test_the_metafile_names_the_paper(paper):
    file = ROOT / 'configs' / paper.folder / 'metafile.yml'
    assert paper.arxiv in file.read_text()


def test_the_page_of_papers_tells_it(paper):
    text = (ROOT / 'docs' / 'papers.md').read_text()
    assert paper.arxiv in text
    assert f'configs/{paper.folder}' in text
