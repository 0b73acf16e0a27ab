r"""CMKD: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/cmkd/cmkd-proposal_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Published: none on detection.
Trained by us: no.
Read: the paper's abstract and a summary (arXiv:2410.06561); there is no code.
    Its lambda is 2; all other settings are ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the paper is about one label an image. Here a sample is a proposal of
    the student, judged by both second stages; all proposals count by the
    teacher's best score, and the boxes of positive ones as well.
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
        cmkd=dict(
            type='mmkd.ProposalTerm',
            teacher='r101',
            decoupled=False,
            cls_loss=dict(
                type='mmkd.CMKDLoss',
                activation='softmax',
                rank_eps=0.1,
                topk=None,  # all proposals of the batch, about 1000
                difficulty='teacher_entropy',
                loss_weight=2.0,
            ),
            box_weight=1.0,
        ),
    ),
)
