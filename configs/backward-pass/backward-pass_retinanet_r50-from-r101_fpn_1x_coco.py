"""BackwardPass: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/backward-pass/backward-pass_retinanet_r50-from-r101_fpn_1x_coco.py

Family: procedure, by BackwardPassTerm.
Published: no result for a detector that we know of; the method is one for
    classifiers and language models.
Trained by us: no.
Read: descriptions of the paper, known second-hand; not the paper. What
    concerns detectors, and every number, is ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: every fourth step both networks look at two more batches forwards and
    backwards, and at a third. Weights are untuned.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_r101_fpn_2x_coco/'
                'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
            ),
        )
    ),
    terms=dict(
        widened=dict(
            type='mmkd.BackwardPassTerm',
            teacher='r101',
            divergence='cls+box',
            num_steps=2,
            step_size=2.0,
            interval=4,
        ),
    ),
)
