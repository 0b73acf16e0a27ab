r"""Predicted: Faster R-CNN R-50 (37.4 AP alone) learns from DINO (49.0 AP).

python tools/train.py \
    configs/predicted/predicted_faster-rcnn_r50-from-dino_fpn_1x_coco.py

Published: none on detection with labels. For this pair KD-DETR, another
    method, reports 2.1 AP more than alone, known second-hand.
Trained by us: no.
Read: abstracts: Sohn et al., "A Simple Semi-Supervised Learning Framework for
    Object Detection", arXiv:2005.04757; Kim and Rush, "Sequence-Level
    Knowledge Distillation", EMNLP 2016, arXiv:1606.07947.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.dino.checkpoint=FILE
Notes: DINO keeps 300 boxes of any score, of which those of 0.3 and more are
    labels beside the annotated ones. The student's heads run twice, its
    backbone and neck once.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        dino=dict(
            config='mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/dino/'
                'dino-4scale_r50_8xb2-12e_coco/'
                'dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth'
            ),
        )
    ),
    terms=dict(
        predicted=dict(
            type='mmkd.PredictedBoxTerm', teacher='dino', score_thr=0.3
        )
    ),
)
