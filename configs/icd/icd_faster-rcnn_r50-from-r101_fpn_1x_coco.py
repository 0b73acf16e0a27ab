r"""ICD: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (41.8 AP).

python tools/train.py \
    configs/icd/icd_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: instance, by InstanceConditionalTerm.
Published: 40.9 AP, the authors' README, for a student with 37.9 AP, which sees
    images of 640 to 800 pixels.
Trained by us: no.
Read: the authors' configs and code (https://github.com/megvii-research/ICD),
    whose weight, queries, start and clipping these are; of the paper the
    abstract.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors' decoder and projections have an AdamW of their own, with
    learning rate 1e-4; here all learn by the student's SGD.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_mstrain_3x_coco/'
                'faster_rcnn_r101_fpn_mstrain_3x_coco_'
                '20210524_110822-4d4d2ca8.pth'
            ),
            inherit=True,
        )
    ),
    terms=dict(
        icd=dict(
            type='mmkd.InstanceConditionalTerm',
            teacher='r101',
            num_classes=80,
            channels=256,
            dim=256,
            heads=8,
            levels=(0, 1, 2, 3, 4),
            negatives=5,
            limit=100,
            warmup=1000,
            loss_weight=3.0,
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(type='value', clip_value=1.0))
