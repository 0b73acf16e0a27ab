r"""Predicted: Faster R-CNN R-50 (37.4 AP alone) learns from DETR (46.2 AP).

python tools/train.py \
    configs/predicted/\
predicted_faster-rcnn_r50-from-deformable-detr_fpn_1x_coco.py

Family: response, by PredictedBoxTerm.
Published: none on detection with labels. From a DINO KD-DETR, another method,
    reports 2.1 AP more than alone, known second-hand.
Trained by us: no.
Read: abstracts: Sohn et al., "A Simple Semi-Supervised Learning Framework for
    Object Detection", arXiv:2005.04757; Kim and Rush, "Sequence-Level
    Knowledge Distillation", EMNLP 2016, arXiv:1606.07947.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.detr.checkpoint=FILE
Notes: the teacher is a Deformable DETR with refinement, which keeps 100 boxes
    of any score; those of 0.3 and more are labels beside the annotated ones.
    The student's heads run twice, its backbone and neck once.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        detr=dict(
            config=(
                'mmdet::deformable_detr/'
                'deformable-detr-refine_r50_16xb2-50e_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/'
                'deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco/'
                'deformable-detr-refine_r50_16xb2-50e_coco_'
                '20221022_225303-844e0f93.pth'
            ),
        )
    ),
    terms=dict(
        predicted=dict(
            type='mmkd.PredictedBoxTerm', teacher='detr', score_thr=0.3
        )
    ),
)
