r"""LSH: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/lsh/lsh-proposal_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Published: none on COCO; on VOC07 Faster R-CNN R-50 from R-101 has 83.0 AP50
    (82.0 alone), with the squared distance alone as much.
Trained by us: no.
Read: what the authors' code does (https://github.com/DoctorKey/LSHFM.detection)
    in a summary of it, from which all settings of the loss are; not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors train for 24 epochs of VOC07+12 at 0.01.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_2x_coco/'
                'faster_rcnn_r101_fpn_2x_coco_'
                'bbox_mAP-0.398_20200504_210455-1d2dac9c.pth'
            ),
        )
    ),
    terms=dict(
        lsh=dict(
            type='mmkd.ProposalFeatureTerm',
            teacher='r101',
            loss=dict(
                type='mmkd.LSHLoss',
                channels=1024,
                mode='lshl2',
                hash_num=4096,
                bias='zero',
                unfold=1,
                loss_weight=7.0,
            ),
        ),
    ),
)
