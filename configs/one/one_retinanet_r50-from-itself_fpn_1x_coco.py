"""ONE: RetinaNet R-50 (36.5 AP alone) learns from itself and lighter heads.

python tools/train.py configs/one/one_retinanet_r50-from-itself_fpn_1x_coco.py

Family: response, by OneTerm.
Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: descriptions of the paper, known second-hand; not the paper. What
    concerns detectors, and every number, is ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none; the sum of the heads teaches each.
Notes: two more heads of one convolution each, in training only. Weights are
    untuned.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        one=dict(
            type='mmkd.OneTerm',
            head=dict(_base_.model.bbox_head, stacked_convs=1),
            channels=256,
            num_levels=5,
            num_branches=2,
        ),
    ),
)
