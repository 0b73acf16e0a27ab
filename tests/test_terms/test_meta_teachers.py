import copy

import heads
import pytest
import runs
import tiny
import torch
from mmengine.optim import OptimWrapper

from mmkd.ops.boxes import giou_error
from mmkd.ops.masks import valid_mask
from mmkd.structures import GroundTruth
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.decoding import decode

data, quick_starts = runs.data, runs.quick_starts

CLASSES = tiny.CLASSES
ALIGN = dict(type='mmkd.ConvAdapt', in_channels=16, out_channels=16)


def term(**settings):
    return {
        'type': 'mmkd.MetaTeachersTerm',
        'levels': (0, 1, 2, 3, 4),
        'align': ALIGN,
        'meta_interval': 1,
        'feature_weight': 1.0,  # random teachers are far away
        'inner_lr': 1e-3,
        **settings,
    }


@pytest.fixture
def build(tmp_path):
    def build(models=None, **settings):
        models = models or dict(
            big=tiny.retinanet(base=16), small=tiny.retinanet()
        )
        named = {}
        for seed, (name, model) in enumerate(models.items(), 3):
            file = tmp_path / f'{name}.pth'
            tiny.save_teacher(model, file, seed=seed)
            named[name] = dict(config=dict(model=model), checkpoint=str(file))
        settings = {'teachers': tuple(models), **settings}
        student = tiny.retinanet()
        student.backbone.norm_eval = False  # statistics move as well
        model = tiny.build(
            tiny.distilled(student, named, dict(meta=term(**settings)))
        )
        model.teachers.load()
        # Else scores of an untrained head are all alike.
        for one in (model, *(t.detector for t in model.teachers.values())):
            torch.manual_seed(len(str(type(one))))
            head = one.bbox_head
            last = getattr(head, 'retina_cls', None) or head.gfl_cls
            torch.nn.init.normal_(last.weight, std=0.2)
        return model.train()

    return build


def shuffle_nets(model, std=0.3):
    """Nets that weigh teachers unequally, and images differently."""
    torch.manual_seed(5)
    for one in model.terms.meta.nets.parameters():
        torch.nn.init.normal_(one, std=std)


def go_to(hub, iteration):
    hub.update_info('iter', iteration)
    hub.update_info('max_iters', 100)


def seen_by(model, images, samples, gt):
    """What student and teachers make of a batch, as the term sees it."""
    term, found = model.terms.meta, {}
    for name in ('', *term.teachers):
        one = model.teachers[name].detector if name else model
        with recording(one, ['neck', 'bbox_head']) as record:
            run_detector(one, images, samples)
        found[name] = term._seen(record, gt)
    return found.pop(''), found


@pytest.fixture
def pictures():
    images, samples = tiny.batch()
    return images, samples, GroundTruth.from_samples(samples, images)


# The weights -----------------------------------------------------------------


def test_weights_of_an_image_are_shares(build, pictures):
    model = build()
    shuffle_nets(model)
    found = model.terms.meta.weigh(*seen_by(model, *pictures))
    assert set(found) == {'outputs', 'features'}
    for one in found.values():
        assert one.shape == (2, 2)
        assert (one >= 0).all()
        torch.testing.assert_close(one.sum(1), torch.ones(2))
        assert (one[0] - one[1]).abs().min() > 1e-4  # an image has its own


def test_they_begin_equal(build, pictures):
    model = build()
    for one in model.terms.meta.weigh(*seen_by(model, *pictures)).values():
        torch.testing.assert_close(one, torch.full((2, 2), 0.5))


def test_a_single_teacher_counts_fully(build, pictures):
    model = build(dict(big=tiny.retinanet(base=16)))
    shuffle_nets(model)
    for one in model.terms.meta.weigh(*seen_by(model, *pictures)).values():
        assert torch.equal(one, torch.ones(2, 1))


def test_images_take_their_weights_along(build, pictures):
    model = build().eval()
    shuffle_nets(model)
    images, samples, gt = pictures
    found = model.terms.meta.weigh(*seen_by(model, images, samples, gt))
    turned = images.flip(0), samples[::-1]
    gt = GroundTruth.from_samples(turned[1], turned[0])
    other = model.terms.meta.weigh(*seen_by(model, *turned, gt))
    for key, one in found.items():
        torch.testing.assert_close(other[key], one.flip(0))


def test_the_border_tells_the_nets_nothing(build, pictures):
    model = build()
    shuffle_nets(model)
    own, others = seen_by(model, *pictures)
    before = model.terms.meta.weigh(own, others)
    outside = [
        valid_mask(own.gt, tuple(one.shape[-2:])) == 0 for one in own.maps
    ]
    assert any(one.any() for one in outside)
    for seen in (own, *others.values()):
        for group in (seen.maps, seen.scores):
            for one, place in zip(group, outside):
                one.data += 9.0 * place
    for key, one in model.terms.meta.weigh(own, others).items():
        assert torch.equal(one, before[key])


# The loss --------------------------------------------------------------------


def literal(model, images, samples, gt, temperature, weights):
    """Parts of the loss, image by image and teacher by teacher."""
    term = model.terms.meta
    detectors = {name: one.detector for name, one in model.teachers.items()}
    outputs = {}
    for name, one in dict(detectors, own=model).items():
        maps = one.extract_feat(images)
        outputs[name] = maps, *one.bbox_head(maps)
    scores = boxes = features = 0.0
    for n in range(len(images)):
        for m, (name, detector) in enumerate(detectors.items()):
            kl = giou = total = 0.0
            errors = []
            for level in range(5):
                one, other = (
                    outputs[key][1][level][n] for key in ('own', name)
                )
                valid = valid_mask(gt, tuple(one.shape[-2:]))[n, 0]
                p, q = ((z / temperature).sigmoid() for z in (other, one))
                divergence = p * (p / q).log()
                divergence = divergence + (1 - p) * ((1 - p) / (1 - q)).log()
                weight = other.sigmoid().amax(0) * valid
                kl = kl + (weight * divergence.sum(0)).sum()
                corners, like = (
                    decode(head, outputs[key][2])[level][n, 0]
                    for head, key in (
                        (model.bbox_head, 'own'),
                        (detector.bbox_head, name),
                    )
                )
                error = giou_error(corners, like, axis=0)
                giou = giou + (weight * error).sum()
                total = total + weight.sum()
                map_ = term.aligns[name].adapts[level](
                    outputs['own'][0][level]
                )
                error = (map_[n] - outputs[name][0][level][n]).square().mean(0)
                errors.append((error * valid).sum() / valid.sum())
            w, v = weights['outputs'][n, m], weights['features'][n, m]
            scores = scores + w * temperature**2 * kl / total
            boxes = boxes + w * giou / total
            features = features + v * sum(errors) / 5
    return dict(
        scores=scores / len(images),
        boxes=boxes / len(images),
        features=features / len(images),
    )


def test_equals_its_formula_image_by_image(build, pictures):
    model = build(
        temperature=2.0, box_weight=0.5, feature_weight=7.0, loss_weight=3.0
    ).eval()
    shuffle_nets(model)
    images, samples, _ = pictures
    term = model.terms.meta
    weights = term.weigh(*seen_by(model, *pictures))
    wanted = literal(model, *pictures, 2.0, weights)
    losses = model.loss(images, samples)
    for part, factor in dict(scores=3, boxes=1.5, features=21).items():
        torch.testing.assert_close(
            losses[f'loss_kd_meta_{part}'],
            factor * wanted[part],
            rtol=1e-4,
            atol=1e-5,
        )
    for m, name in enumerate(('big', 'small')):
        for kind in ('outputs', 'features'):
            torch.testing.assert_close(
                losses[f'kd_meta_{kind}_{name}'], weights[kind][:, m].mean()
            )


def test_a_student_that_is_its_teacher_pays_nothing(build, pictures):
    model = build(dict(same=tiny.retinanet()), align=None).eval()
    model.load_state_dict(
        model.teachers['same'].detector.state_dict(), strict=False
    )
    images, samples, _ = pictures
    found = model.loss(images, samples)
    for part in ('scores', 'boxes', 'features'):
        assert found[f'loss_kd_meta_{part}'].abs() < 1e-6


def test_the_loss_does_not_teach_the_nets(build, pictures, hub):
    go_to(hub, 1)
    model = build(meta_interval=10)
    shuffle_nets(model)
    nets = copy.deepcopy(model.terms.meta.nets)
    tiny.total(model.loss(*pictures[:2])).backward()
    assert all(one.grad is None for one in nets.parameters())
    optimiser = OptimWrapper(
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    )
    model.train_step(tiny.pixels(*pictures[:2]), optimiser)
    for one, was in zip(model.terms.meta.nets.parameters(), nets.parameters()):
        assert torch.equal(one, was)


# Lessons ---------------------------------------------------------------------


def lesson_due(model, hub, pictures):
    """One step that fills the store, and the training at the next."""
    go_to(hub, 0)
    model.loss(*pictures[:2])
    go_to(hub, 1)


def test_a_lesson_moves_the_nets_and_nothing_else(build, pictures, hub):
    model = build()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    lesson_due(model, hub, pictures)
    tiny.total(model.loss(*pictures[:2])).backward()
    optimiser.step()
    optimiser.zero_grad()
    term = model.terms.meta
    term._lesson = None
    state = copy.deepcopy(model.state_dict())
    momenta = copy.deepcopy(optimiser.state_dict())
    parameters = [id(one) for one in model.parameters()]
    plain = [dict(vars(one)) for one in model.modules()]
    taught = [
        copy.deepcopy(one.detector.state_dict())
        for one in model.teachers.values()
    ]
    with recording(model, []) as record:
        pass
    term._teach_nets(model._step(record, *pictures[:2], [], iteration=1))
    own = ('nets', 'moment', 'square', 'lessons')
    moved = {
        key
        for key, one in model.state_dict().items()
        if not torch.equal(one, state[key])
    }
    assert {key.split('.')[2] for key in moved} == set(own)
    assert all(key.startswith('terms.meta.') for key in moved)
    assert runs.differences(momenta, optimiser.state_dict()) == []
    assert [id(one) for one in model.parameters()] == parameters
    assert [dict(vars(one)) for one in model.modules() if one is not term] == [
        values
        for one, values in zip(model.modules(), plain)
        if one is not term
    ]
    assert all(one.grad is None for one in model.parameters())
    for teacher, was in zip(model.teachers.values(), taught):
        assert runs.differences(teacher.detector.state_dict(), was) == []


def test_statistics_of_the_student_move_once_a_step(build, pictures, hub):
    counts = {}
    for interval in (1, 1000):
        model = build(meta_interval=interval)
        lesson_due(model, hub, pictures)
        model.loss(*pictures[:2])
        counts[interval] = {
            key: one
            for key, one in model.state_dict().items()
            if 'running' in key or 'num_batches' in key
        }
    assert runs.differences(counts[1], counts[1000]) == []


def test_lessons_come_at_the_interval_and_once(build, pictures, hub):
    model = build(meta_interval=2)
    found = []
    for iteration in range(5):
        go_to(hub, iteration)
        model.loss(*pictures[:2])
        if iteration == 2:  # shown to a second time
            model.loss(*pictures[:2])
        found.append(model.terms.meta.lessons.item())
    # The first step finds the store empty.
    assert found == [0, 0, 1, 1, 2]


def test_the_slope_is_that_of_finite_differences(build, pictures, hub):
    torch.manual_seed(0)
    model = build(buffer_size=2, temperature=1.0)
    images, samples, _ = pictures
    lesson_due(model, hub, pictures)
    model.backbone.eval()  # of a batch of two, statistics are wild
    model.double()
    for teacher in model.teachers.values():
        teacher.detector.double()
    shuffle_nets(model)
    term = model.terms.meta
    with recording(model, []) as record:
        pass
    step = model._step(record, images.double(), samples, [], iteration=1)
    names, own = zip(*term.nets.named_parameters())
    torch.manual_seed(1)
    way = [torch.randn_like(one) for one in own]

    def lesson(distance):
        return term.lesson(
            step,
            {
                name: (one + distance * along).detach().requires_grad_()
                for name, one, along in zip(names, own, way)
            },
        )

    _, slopes = lesson(0.0)
    found = sum((one * along).sum() for one, along in zip(slopes, way))
    ends = [lesson(distance)[0] for distance in (1e-4, -1e-4)]
    assert found.abs() > 1e-7
    torch.testing.assert_close(
        found, (ends[0] - ends[1]) / 2e-4, rtol=1e-3, atol=1e-9
    )


def test_adam_is_torchs(build, hub):
    model = build()
    term = model.terms.meta
    shuffle_nets(model)
    wanted = [one.detach().clone() for one in term.nets.parameters()]
    optimiser = torch.optim.Adam(wanted, lr=1e-3, weight_decay=1e-4)
    for seed in range(3):
        torch.manual_seed(seed)
        slopes = [torch.randn_like(one) for one in wanted]
        for one, slope in zip(wanted, slopes):
            one.grad = slope.clone()
        optimiser.step()
        term._descend([*term.nets.parameters()], slopes)
    for one, other in zip(term.nets.parameters(), wanted):
        assert torch.equal(one, other)
        assert one.grad is None


def test_focal_losses_have_a_second_derivative_on_every_device(
    build, monkeypatch, pictures, hub
):
    """As on a GPU, where labels that are not one-hot take another way."""
    model = build()
    lesson_due(model, hub, pictures)
    seen = []
    method = type(model.bbox_head.loss_cls).forward

    def forward(self, pred, target, *args, **more):
        seen.append(target.ndim == pred.ndim)
        return method(self, pred, target, *args, **more)

    monkeypatch.setattr(type(model.bbox_head.loss_cls), 'forward', forward)
    with recording(model, []) as record:
        pass
    step = model._step(record, *pictures[:2], [], iteration=1)
    model.terms.meta.lesson(step)
    assert seen
    assert all(seen)


# The store -------------------------------------------------------------------


def test_an_image_is_as_hard_as_its_detection_loss(
    build, pictures, hub, monkeypatch
):
    model = build()
    model.backbone.eval()
    images, samples, _ = pictures
    found = []
    monkeypatch.setattr(
        model.terms.meta.hard, 'watch', lambda *args: found.append(args)
    )
    model.loss(images, samples)
    (((shown, noted, losses)),) = found
    assert torch.equal(shown, images)
    assert noted == samples
    with torch.no_grad():
        for index, loss in enumerate(losses):
            alone = model.student_class.loss(
                model, images[index : index + 1], samples[index : index + 1]
            )
            torch.testing.assert_close(
                loss, tiny.total(alone), rtol=1e-4, atol=1e-5
            )


def test_images_without_labels_are_not_kept(build, pictures, hub):
    model = build()
    images, samples, _ = pictures
    del samples[1].gt_instances
    model.loss(images, samples)
    (kept,) = model.terms.meta.run_state()['images']
    assert kept['image'].shape[1:] == samples[0].img_shape


def test_evaluation_teaches_no_net_and_keeps_no_image(build, pictures, hub):
    model = build().eval()
    model.loss(*pictures[:2])
    assert len(model.terms.meta.hard) == 0


def test_a_stopped_training_finds_all_again(data, tmp_path):
    teacher = tiny.retinanet(base=16)
    file = tiny.save_teacher(teacher, tmp_path / 'big.pth')
    named = dict(big=dict(config=dict(model=teacher), checkpoint=str(file)))
    settings = dict(teachers=('big',), meta_interval=2, buffer_size=3)

    def config(folder):
        model = tiny.distilled(
            tiny.retinanet(), named, dict(meta=term(**settings))
        )
        return runs.config(
            data,
            tmp_path / folder,
            iters=6,
            model=model,
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook', interval=1, by_epoch=False
                )
            ),
        )

    whole = runs.train(config('whole'))
    stopped = tmp_path / 'whole' / 'iter_3.pth'
    resumed = runs.train(config('resumed'), resume=stopped)
    assert whole['weights']['terms.meta.lessons'] > 1
    assert runs.differences(whole, resumed) == []


# Pairs -----------------------------------------------------------------------


def test_a_teacher_with_another_head_teaches_features(build, pictures):
    model = build(
        dict(big=tiny.retinanet(base=16), other=heads.gfl(base=16)),
        output_teachers=('big',),
    )
    found = model.loss(*pictures[:2])
    assert 'kd_meta_features_other' in found
    assert 'kd_meta_outputs_other' not in found


def test_features_alone_need_no_head(build, pictures):
    model = build(output_teachers=())
    found = model.loss(*pictures[:2])
    assert {key for key in found if key.startswith('loss_kd')} == {
        'loss_kd_meta_features'
    }
    assert not model.terms.meta.compares_classes()


def test_other_anchors_are_refused(build):
    other = tiny.retinanet(base=16)
    other.bbox_head.anchor_generator.scales_per_octave = 2
    with pytest.raises(ValueError, match='MetaTeachersTerm pairs boxes'):
        build(dict(big=other))


def test_other_channels_name_the_adapter(build):
    with pytest.raises(ValueError, match=r'mmkd\.ConvAdapt'):
        build(dict(big=tiny.retinanet(base=16, channels=24)), align=None)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(teachers=()), 'needs at least one teacher'),
        (dict(output_teachers=('bg',)), "Did you mean 'big'"),
        (dict(align=dict(bg=ALIGN)), "Did you mean 'big'"),
        (dict(meta_scope=('nek',)), "Did you mean 'neck'"),
        (dict(meta_scope=('data_preprocessor',)), 'can be trained'),
        (dict(temperature=0), 'temperature > 0'),
        (dict(buffer_size=0), 'buffer_size > 0'),
    ],
)
def test_what_cannot_be_is_refused(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_what_has_no_second_derivative_is_told(
    build, pictures, hub, monkeypatch
):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return Never.apply(grad)

    class Never(Once):
        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError('not supported twice.')

    model = build()
    lesson_due(model, hub, pictures)
    neck = type(model.neck)
    method = neck.forward
    monkeypatch.setattr(
        neck,
        'forward',
        lambda self, maps: tuple(Once.apply(x) for x in method(self, maps)),
    )
    with pytest.raises(RuntimeError, match='meta_scope'):
        model.loss(*pictures[:2])
