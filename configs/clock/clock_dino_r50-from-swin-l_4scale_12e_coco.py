"""CLoCKDistill: DINO R-50 (49.0 AP alone) learns from Swin-L (57.2 AP).

python tools/train.py \
    configs/clock/clock_dino_r50-from-swin-l_4scale_12e_coco.py

Family: query, by CLoCKTerm.
Published: for other pairs. 2.2 to 6.4 AP more over DAB-DETR, Deformable DETR
    and DINO, on KITTI and COCO.
Trained by us: no.
Read: a summary and the abstract's numbers; no code.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.0001;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.swin.checkpoint=FILE
Notes: the teacher has a finer map more, which is left out of the memories'
    comparison. The weights are untuned.
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
        clock=dict(
            type='mmkd.CLoCKTerm',
            teacher='swin',
            levels=(0, 1, 2, 3),
            teacher_levels=(1, 2, 3, 4),
        )
    ),
)
