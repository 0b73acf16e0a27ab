import copy

import heads
import pytest
import tiny
import torch
import torch.nn.functional as F

from mmkd.structures import GroundTruth
from mmkd.terms.boundary import best_anchors

CLASSES = 3
STD = torch.tensor(tiny.PIXELS['std'])[:, None, None]


def term(**settings):
    return dict(type='mmkd.BoundaryTerm', teacher='big', **settings)


@pytest.fixture
def build(tmp_path):
    def build(kind='retinanet', teacher=None, **settings):
        teacher = teacher or getattr(heads, kind)(base=16)
        file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth', seed=3)
        big = dict(config=dict(model=teacher), checkpoint=str(file))
        student = getattr(heads, kind)()
        model = tiny.build(
            tiny.distilled(student, dict(big=big), dict(x=term(**settings)))
        )
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for seed, one in enumerate((model, model.teachers['big'].detector)):
            torch.manual_seed(seed)
            for name, weight in one.bbox_head.named_parameters():
                if name.endswith('weight') and weight.ndim > 1:
                    torch.nn.init.normal_(weight.data, std=0.2)
        return model.train()

    return build


def data(boxes=8, **settings):
    images, samples = tiny.batch(boxes=boxes, **settings)
    return images.clamp(-1.5, 1.5), samples


def told(model, images, samples):
    """The step that the term is shown, and what it says of it."""
    kept = []
    model.terms['x'].register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    losses = model.loss(images, samples)
    return kept[-1], losses


def teacher_logits(model, images):
    """Of each image all anchors, by level, row and column, (N, P, C)."""
    big = model.teachers['big'].detector
    return head_logits(big, images)


def head_logits(detector, images):
    maps = detector.bbox_head(detector.extract_feat(images))[0]
    return torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2)


def literal_objects(model, images, samples):
    """(image, anchor, label, class the teacher gives) of each box."""
    logits = teacher_logits(model, images)
    found = []
    for image, sample in enumerate(samples):
        boxes = sample.gt_instances.bboxes.tolist()
        labels = sample.gt_instances.labels.tolist()
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            best, place, start = -1e9, None, 0
            for stride in (8, 16, 32, 64, 128):
                cells = 128 // stride
                for row in range(cells):
                    for column in range(cells):
                        index = start + row * cells + column
                        score = logits[image, index, label].item()
                        if (
                            column * stride < x2
                            and (column + 1) * stride > x1
                            and row * stride < y2
                            and (row + 1) * stride > y1
                            and score > best
                        ):
                            best, place = score, index
                start += cells**2
            top = logits[image, place].argmax().item()
            found.append((image, place, label, top))
    return found


def test_an_object_is_read_where_its_class_scores_best(build):
    model = build(rival='second')
    images, samples = data()
    step, _ = told(model, images, samples)
    objects = model.terms['x'].objects(step)
    wanted = literal_objects(model, images, samples)
    found = zip(objects.image.tolist(), objects.site.tolist())
    assert list(found) == [one[:2] for one in wanted]
    assert objects.current.tolist() == [one[3] for one in wanted]
    counts = [float(label == top) for _, _, label, top in wanted]
    assert objects.counts.tolist() == counts
    assert 0 < sum(counts) < len(counts)
    logits = teacher_logits(model, images)
    for (image, place, _, _), other in zip(wanted, objects.other.tolist()):
        order = logits[image, place].argsort(descending=True)
        assert other == order[1]


def test_cells_that_a_box_only_touches_are_not_its_own():
    scores = torch.arange(16.0).view(1, 1, 1, 4, 4)
    gt = GroundTruth.from_boxes(
        [torch.tensor([[8.0, 0, 16, 16], [9, 9, 25, 9.5]])], shape=(32, 32)
    )
    # Rows 0 and 1 of column 1; row 1 of columns 1 to 3.
    assert best_anchors([scores], gt).tolist() == [5, 7]


def test_anchors_and_levels_follow_each_other():
    gt = GroundTruth.from_boxes(
        [torch.tensor([[0.0, 0, 32, 32]])] * 2,
        shape=(32, 32),
        labels=[torch.tensor([1]), torch.tensor([0])],
    )
    fine, coarse = torch.zeros(2, 2, 3, 4, 4), torch.zeros(2, 2, 3, 1, 1)
    fine[0, 1, 2, 3, 1] = coarse[1, 0, 1] = 5
    fine[0, 0, 0, 0, 0] = 9  # another class
    # 2 anchors of 16 cells, 3 rows of 4, 1; all 48 of the fine level, 1.
    assert best_anchors([fine, coarse], gt).tolist() == [32 + 13, 48 + 1]


def test_a_rival_is_drawn_by_the_probabilities_of_the_others(build):
    model = build('gfl', num_steps=1)
    images, samples = data(boxes=60, shapes=((128, 128),) * 3)
    step, _ = told(model, images, samples)
    torch.manual_seed(0)
    drawn, wanted, variance = torch.zeros(CLASSES), 0.0, 0.0
    for _ in range(9):
        objects = model.terms['x'].objects(step)
        assert (objects.other != objects.current).all()
        logits = teacher_logits(model, images)
        rows = logits[objects.image, objects.site].sigmoid()
        rows.scatter_(1, objects.current[:, None], 0.0)
        chances = rows / rows.sum(1, keepdim=True)
        wanted = wanted + chances.sum(0)
        variance = variance + (chances * (1 - chances)).sum(0)
        drawn += torch.bincount(objects.other, minlength=CLASSES)
    assert ((drawn - wanted).abs() < 4 * variance.sqrt() + 1e-6).all()


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_samples_lie_closer_to_the_boundary_than_their_sources(build, norm):
    size = 1.0 if norm == 'linf' else 40.0
    model = build(norm=norm, step_size=size, num_steps=10, rival='second')
    images, samples = data(boxes=1, shapes=((128, 128),) * 8)
    for one, found in zip(samples, literal_objects(model, images, samples)):
        one.gt_instances.labels[:] = found[3]
    step, losses = told(model, images, samples)
    objects = model.terms['x'].objects(step)
    counts = objects.counts > 0
    assert counts.sum() >= 2
    margins = []
    for shown in (images, model.terms['x'].moved(step, objects)):
        rows = teacher_logits(model, shown)[objects.image, objects.site]
        margins.append(objects.margin(rows).detach()[counts])
    assert (margins[0] < 0).all()
    assert (margins[1].abs() < margins[0].abs()).all()
    turned = (margins[1] >= 0).float().mean()
    assert turned > 0.5
    assert losses['kd_x_turned'] == turned
    # They are led across, and not far beyond.
    assert margins[1].max() < 0.1 + 0.25 * margins[0].abs().max()


def test_the_step_is_the_teachers_gradient(build):
    model = build(norm='raw', step_size=0.01, num_steps=1, rival='second')
    images, samples = data()
    step, _ = told(model, images, samples)
    objects = model.terms['x'].objects(step)
    moved = model.terms['x'].moved(step, objects)
    shown = images.clone().requires_grad_()
    rows = teacher_logits(model, shown)[objects.image, objects.site]
    lead = sum(
        row[other] - row[current]
        for row, other, current, count in zip(
            rows, objects.other, objects.current, objects.counts
        )
        if count
    )
    (slope,) = torch.autograd.grad(lead, shown)
    slope[1, :, 96:] = slope[1, :, :, 112:] = 0
    wanted = 0.01 * slope / STD**2
    torch.testing.assert_close(moved - images, wanted, rtol=1e-2, atol=2e-7)
    assert wanted.abs().max() > 1e-6


def test_what_has_turned_is_no_longer_pushed(build):
    model = build(overshoot=-1e3)
    images, samples = data()
    step, losses = told(model, images, samples)
    objects = model.terms['x'].objects(step)
    assert torch.equal(model.terms['x'].moved(step, objects), images)
    assert losses['kd_x_turned'] == 0


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_the_two_are_compared_at_the_objects_alone(build, temperature):
    model = build(
        rival='second', temperature=temperature, loss_weight=3.0, num_steps=2
    ).eval()
    images, samples = data()
    step, losses = told(model, images, samples)
    objects = model.terms['x'].objects(step)
    moved = model.terms['x'].moved(step, objects)
    assert (moved != images).any()
    own, other = head_logits(model, moved), teacher_logits(model, moved)
    total = count = 0.0
    for image, place, label, top in literal_objects(model, images, samples):
        if label != top:
            continue
        p = (other[image, place] / temperature).sigmoid()
        q = own[image, place] / temperature
        cross = F.binary_cross_entropy_with_logits(q, p, reduction='sum')
        entropy = F.binary_cross_entropy(p, p, reduction='sum')
        total, count = total + cross - entropy, count + 1
    wanted = 3 * temperature**2 * total / count
    found = losses['loss_kd_x_samples']
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert found > 0


def test_heads_with_a_background_move_between_objects(tmp_path):
    model, teacher = tiny.retinanet(), tiny.retinanet(base=16)
    for one in (model, teacher):
        one.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    file = tiny.save_teacher(teacher, tmp_path / 'teacher.pth')
    big = dict(config=dict(model=teacher), checkpoint=str(file))
    model = tiny.build(tiny.distilled(model, dict(big=big), dict(x=term())))
    model.teachers.load()
    bias = model.teachers['big'].detector.bbox_head.retina_cls.bias
    with torch.no_grad():
        bias[CLASSES] = 9.0  # the background
    step, losses = told(model.train(), *data())
    objects = model.terms['x'].objects(step)
    assert (objects.current < CLASSES).all()
    assert (objects.other < CLASSES).all()
    assert losses['loss_kd_x_samples'] > 0


def test_border_range_weights_modes_and_statistics_are_kept(build):
    model = build(num_steps=3, step_size=200.0)
    big = model.teachers['big'].detector
    model.backbone.layer1.eval()
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    images, samples = data()
    step, _ = told(model, images, samples)
    before = copy.deepcopy((model.state_dict(), big.state_dict()))
    modes = [one.training for one in model.modules()]
    term = model.terms['x']
    moved = term.moved(step, term.objects(step))
    assert torch.equal(moved[1, :, 96:], images[1, :, 96:])
    assert torch.equal(moved[1, :, :, 112:], images[1, :, :, 112:])
    mean = torch.tensor(tiny.PIXELS['mean'])[:, None, None]
    values = (moved * STD + mean)[:, :, :96, :112]
    assert values.min() > -1e-3
    assert values.max() < 255 + 1e-3
    for side, state in zip((model, big), before):
        for key, one in side.state_dict().items():
            assert torch.equal(one, state[key]), key
    assert [one.training for one in model.modules()] == modes
    assert all((one.grad == 1).all() for one in model.parameters())
    assert all(one.grad is None for one in big.parameters())


def test_no_statistic_is_kept_of_an_image_that_was_moved(build):
    states = []
    for weight in (0.0, 1.0):
        model = build(loss_weight=weight)
        model.loss(*data())
        states.append(model.state_dict())
    assert all(
        torch.equal(states[0][key], one) for key, one in states[1].items()
    )


def test_a_student_that_is_the_teacher_costs_nothing(build):
    model = build(teacher=heads.retinanet())
    big = model.teachers['big'].detector
    model.load_state_dict(big.state_dict(), strict=False)
    losses = model.eval().loss(*data())
    assert losses['loss_kd_x_samples'].abs() < 1e-6


def test_it_teaches_the_student_and_not_the_teacher(build):
    model = build()
    model.loss(*data())['loss_kd_x_samples'].backward()
    layer = [*model.backbone.children()][-1]
    assert all(one.grad.abs().sum() > 0 for one in layer.parameters())
    big = model.teachers['big'].detector
    assert all(one.grad is None for one in big.parameters())


def test_images_without_objects_are_defined(build):
    model = build()
    losses = model.loss(*data(boxes=0))
    assert losses['loss_kd_x_samples'] == 0
    losses['loss_kd_x_samples'].backward()


def test_it_is_due_every_so_many_iterations(build, hub):
    model = build(interval=2)
    hub.update_info('max_iters', 10)
    said = []
    for iteration in range(4):
        hub.update_info('iter', iteration)
        losses = model.loss(*data())
        said.append(bool(losses['loss_kd_x_samples'] > 0))
    assert said == [True, False, True, False]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(norm='l1'), 'no norm'),
        (dict(rival='third'), 'no rival'),
        (dict(num_steps=0), 'num_steps > 0'),
        (dict(temperature=0.0), 'temperature > 0'),
        (dict(tap='bbox_hed'), "Did you mean 'bbox_head'"),
    ],
)
def test_a_wrong_setting_is_told(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_pairs_that_do_not_fit_are_refused_with_advice(build):
    teacher = heads.retinanet(base=16)
    teacher['bbox_head']['anchor_generator'].scales_per_octave = 2
    with pytest.raises(ValueError, match='BoundaryTerm pairs.*features'):
        build(teacher=teacher)
    with pytest.raises(ValueError, match='has one class.*BackwardPassTerm'):
        build(teacher=heads.retinanet(base=16, num_classes=1))
