"""DIST: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/dist/dist_retinanet_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: none for this pair; RetinaNet R-50 from X-101-64x4d, 2x, has 39.8
    AP (37.4 AP alone) in the authors' README.
Trained by us: no.
Read: the authors' losses for detection and segmentation and their config of
    that other pair (https://github.com/hunto/MasKD), from which both weights
    are, and their README (https://github.com/hunto/DIST_KD); of the paper the
    abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors take each level by itself, a cell with its nine anchors
    as one sample and all cells alike; here levels are taken together, anchors
    are samples and count by the teacher's score.
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
        dist=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.DISTLoss',
                num_classes=80,  # each of the nine anchors of a cell
                activation='sigmoid',
                inter_weight=1.0,
                intra_weight=1.0,
                weight_by='teacher',
                loss_weight=5.0,  # the authors add five levels
            ),
        )
    ),
)
