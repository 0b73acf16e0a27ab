"""Boxes are those that each head itself would predict."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmkd.terms.decoding import check_decodable, decode

SIZE = (64, 96)
#: Of the image, so far off that no box is cut.
FAR = (10_000, 10_000)
STRIDES = [8, 16]
CLASSES = 2
ANCHORS = dict(
    type='AnchorGenerator',
    ratios=[0.5, 1.0],
    octave_base_scale=4,
    scales_per_octave=2,
    strides=STRIDES,
)
ONE = dict(ANCHORS, ratios=[1.0], scales_per_octave=1)
TOWERS = dict(in_channels=4, feat_channels=8, stacked_convs=1)
GROUPS = dict(type='GN', num_groups=2)
HEADS = dict(
    retinanet=dict(type='RetinaHead', anchor_generator=ANCHORS, **TOWERS),
    rpn=dict(
        type='RPNHead',
        anchor_generator=dict(ANCHORS),
        in_channels=4,
        feat_channels=8,
    ),
    ssd=dict(
        type='SSDHead',
        in_channels=(4, 4),
        anchor_generator=dict(
            type='SSDAnchorGenerator',
            strides=STRIDES,
            ratios=([2], [2, 3]),
            min_sizes=[16, 32],
            max_sizes=[32, 48],
            scale_major=False,
        ),
    ),
    atss=dict(
        type='ATSSHead', anchor_generator=ONE, norm_cfg=GROUPS, **TOWERS
    ),
    ddod=dict(
        type='DDODHead',
        anchor_generator=ONE,
        norm_cfg=GROUPS,
        use_dcn=False,
        **TOWERS,
    ),
    gfl=dict(
        type='GFLHead',
        anchor_generator=ONE,
        norm_cfg=GROUPS,
        reg_max=6,
        **TOWERS,
    ),
    tood=dict(
        type='TOODHead',
        anchor_generator=ONE,
        anchor_type='anchor_free',
        num_dcn=0,
        norm_cfg=GROUPS,
        in_channels=4,
        feat_channels=8,
        stacked_convs=2,
    ),
    fcos=dict(type='FCOSHead', strides=STRIDES, norm_cfg=GROUPS, **TOWERS),
    fcos_normed=dict(
        type='FCOSHead',
        strides=STRIDES,
        norm_on_bbox=True,
        norm_cfg=GROUPS,
        **TOWERS,
    ),
    centernet=dict(
        type='CenterNetUpdateHead',
        strides=STRIDES,
        hm_min_radius=4,
        hm_min_overlap=0.8,
        more_pos_thresh=0.2,
        more_pos_topk=9,
        soft_weight_on_reg=False,
        norm_cfg=GROUPS,
        **TOWERS,
    ),
    rtmdet=dict(
        type='RTMDetHead',
        anchor_generator=dict(
            type='MlvlPointGenerator', offset=0, strides=STRIDES
        ),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        with_objectness=False,
        norm_cfg=GROUPS,
        **TOWERS,
    ),
    yolox=dict(type='YOLOXHead', strides=STRIDES, norm_cfg=GROUPS, **TOWERS),
)


@pytest.fixture
def build():
    init_default_scope('mmdet')

    def build(kind):
        torch.manual_seed(0)
        config = ConfigDict(HEADS[kind])
        if kind != 'rpn':
            config.num_classes = CLASSES
        config.test_cfg = dict(
            nms_pre=-1,
            score_thr=-1.0,
            min_bbox_size=-1,
            max_per_img=100_000,
            nms=dict(type='nms', iou_threshold=1.0),
        )
        head = MODELS.build(config)
        for name, one in head.named_parameters():
            if one.ndim > 1:
                torch.nn.init.normal_(one, std=0.3)
            elif 'bias' in name:
                torch.nn.init.uniform_(one, -0.2, 0.2)
        return head

    return build


def maps(images=2):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(
            images,
            4,
            SIZE[0] // stride,
            SIZE[1] // stride,
            generator=generator,
        )
        for stride in STRIDES
    ]


def outputs(head):
    with torch.no_grad():
        return head(maps())


def rows(boxes, image):
    """All boxes of an image, in hundredths of a pixel, without order."""
    boxes = torch.cat(
        [one[image].permute(2, 3, 0, 1).reshape(-1, 4) for one in boxes]
    )
    return torch.unique((boxes * 100).round().long(), dim=0)


def predicted(head, outs):
    """All boxes of each image that the head's own post-processing finds."""
    meta = dict(img_shape=FAR, scale_factor=(1.0, 1.0), ori_shape=FAR)
    more = {} if type(head).__name__ == 'RPNHead' else dict(with_nms=False)
    if type(head).__name__ == 'SSDHead':
        head.loss_cls = None  # MMDetection's code asks for it
    found = head.predict_by_feat(*outs, batch_img_metas=[meta, meta], **more)
    return [
        torch.unique((one.bboxes * 100).round().long(), dim=0) for one in found
    ]


@pytest.mark.parametrize('kind', HEADS)
def test_boxes_are_the_heads_own(build, kind):
    head = build(kind).eval()
    outs = outputs(head)
    ours = decode(head, outs[1])
    for one, stride in zip(ours, STRIDES):
        assert one.shape[2:] == (4, SIZE[0] // stride, SIZE[1] // stride)
    if kind not in ('yolox', 'tood'):
        ours = [one.clamp(min=0) for one in ours]  # as predictions are
    for image, theirs in enumerate(predicted(head, outs)):
        torch.testing.assert_close(rows(ours, image), theirs)


@pytest.mark.parametrize('kind', HEADS)
def test_a_head_in_training_means_the_same_boxes(build, kind):
    head = build(kind)
    evaluated = decode(head.eval(), outputs(head)[1])
    trained = decode(head.train(), outputs(head)[1])
    torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize('kind', HEADS)
def test_boxes_stand_where_their_anchors_do(build, kind):
    """A cell alone changes its own box alone, and its own anchor's."""
    head = build(kind).eval()
    boxes = [one.clone() for one in outputs(head)[1]]
    before = decode(head, boxes)
    anchors = before[1].shape[1]
    place = (boxes[1].shape[1] // anchors) * (anchors - 1)
    boxes[1][1, place, 2, 3] += 0.5
    after = decode(head, boxes)
    changed = (after[1] != before[1]).any(2)
    assert torch.equal(after[0], before[0])
    assert changed.nonzero().tolist() == [[1, anchors - 1, 2, 3]]


def test_it_is_a_path_for_gradients(build):
    head = build('gfl')
    boxes = [one.clone().requires_grad_() for one in outputs(head)[1]]
    sum(one.sum() for one in decode(head, boxes)).backward()
    assert all(one.grad.any() for one in boxes)


@pytest.mark.parametrize('name', ['RepPointsHead', 'VFNetHead', 'FoveaHead'])
def test_heads_of_other_forms_are_refused(name):
    kind = MODELS.get(name)
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    head.prior_generator = head.bbox_coder = object()
    head.num_classes = CLASSES
    with pytest.raises(ValueError, match=f"student's {name}.*class scores"):
        check_decodable('BoxTerm', head, 'student')


def test_a_module_without_anchors_is_refused():
    head = torch.nn.Linear(1, 1)
    head.num_classes = CLASSES
    with pytest.raises(ValueError, match="teacher's Linear"):
        check_decodable('BoxTerm', head, 'teacher')
    head.prior_generator = head.bbox_coder = object()
    check_decodable('BoxTerm', head, 'teacher')
    del head.num_classes
    with pytest.raises(ValueError, match="teacher's Linear"):
        check_decodable('BoxTerm', head, 'teacher')


@pytest.mark.parametrize('kind', HEADS)
def test_known_heads_are_not(build, kind):
    check_decodable('BoxTerm', build(kind), 'student')
