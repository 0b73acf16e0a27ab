r"""SoftTarget: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/soft-target/soft-target_retinanet_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: no result with these weights that we know of.
Trained by us: no.
Read: a description of the paper's loss, which is for classifiers, known
    second-hand; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: one binary divergence a class, at each anchor, weighted by the
    teacher's largest score. Weight and temperature are untuned.
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
        soft_target=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.SoftTargetLoss',
                num_classes=80,  # each of the nine anchors of a cell
                activation='sigmoid',
                temperature=1.0,
                weight_by='teacher',
                loss_weight=1.0,
            ),
        )
    ),
)
