"""KD-DETR: DINO R-50 (49.0 AP alone) learns from Swin-L (57.2 AP).

python tools/train.py \
    configs/kd-detr/kd-detr_dino_r50-from-swin-l_4scale_12e_coco.py

Family: query, by SharedQueryTerm.
Published: for other pairs. DAB-DETR R-50 42.2 → 45.7 and R-18 36.2 → 41.4;
    2.6 to 5.2 AP more over DAB-DETR, Deformable DETR and DINO.
Trained by us: no.
Read: a summary and the abstract's numbers; no code.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.0001;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.swin.checkpoint=FILE
Notes: the teacher looks at five maps, the student at four; the queries of
    both are of one form. The weights are DETR's own.
"""

_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        swin=dict(
            config='mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/dino/'
                'dino-5scale_swin-l_8xb2-12e_coco/'
                'dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth'
            ),
        )
    ),
    terms=dict(
        kd_detr=dict(
            type='mmkd.SharedQueryTerm',
            teacher='swin',
            general=300,
            specific=True,
            cls_weight=1.0,
            l1_weight=5.0,
            giou_weight=2.0,
        )
    ),
)
