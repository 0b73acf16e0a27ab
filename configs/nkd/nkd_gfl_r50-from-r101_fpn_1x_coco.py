"""NKD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/nkd/nkd_gfl_r50-from-r101_fpn_1x_coco.py

Family: response.
Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: the authors' loss and ImageNet config (https://github.com/yzd-v/cls_KD),
    from which temperature and inner weight are; of the paper the abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: a softmax over the classes of a head that has sigmoids, at the cells
    inside boxes. The outer weight is untuned.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_r101_fpn_mstrain_2x_coco/'
                'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
            ),
        )
    ),
    terms=dict(
        nkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.NKDLoss',
                num_classes=80,
                temperature=1.0,
                other_weight=1.5,
                loss_weight=1.0,
            ),
        )
    ),
)
