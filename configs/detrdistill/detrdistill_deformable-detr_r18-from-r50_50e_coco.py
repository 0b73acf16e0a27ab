r"""DETRDistill: Deformable DETR R18 (40.0 AP alone) learns from R50 (44.3 AP).

python tools/train.py \
    configs/detrdistill/detrdistill_deformable-detr_r18-from-r50_50e_coco.py

Family: query, by DETRDistillTerm.
Published: 43.3 AP from R-101 (44.8 AP), R-18 alone 40.0, by the authors'
    README; the zoo has no weights of R-101, and none of R-18.
Trained by us: no.
Read: a summary of Chang et al., "DETRDistill: A Universal Knowledge
    Distillation Framework for DETR-families", ICCV 2023, arXiv:2211.10156;
    neither the paper nor code. All weights are ours, untuned.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the decoder is run twice a step, and the queries of each of its layers
    are matched on the CPU.
"""

_base_ = '../_base_/students/deformable-detr_r18_16xb2-50e.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r50=dict(
            config='mmdet::deformable_detr/'
            'deformable-detr_r50_16xb2-50e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/'
                'deformable_detr/deformable-detr_r50_16xb2-50e_coco/'
                'deformable-detr_r50_16xb2-50e_coco_20221029_210934-'
                '6bc7d21b.pth'
            ),
        )
    ),
    terms=dict(
        detrdistill=dict(
            type='mmkd.DETRDistillTerm', teacher='r50', channels=(256, 256)
        )
    ),
)
