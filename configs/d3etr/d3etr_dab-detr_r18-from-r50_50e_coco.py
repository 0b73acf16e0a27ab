"""D³ETR: DAB-DETR R-18 (36.2 AP alone) learns from R-50 (42.3 AP).

python tools/train.py configs/d3etr/d3etr_dab-detr_r18-from-r50_50e_coco.py

Family: query, by D3ETRTerm.
Published: none of this pair is known to us; Conditional DETR R-50-C5 gains
    2.4 AP in 50 epochs and 7.8 in 12, from R-101-C5.
Trained by us: no.
Read: abstract and a summary of Chen et al., "D³ETR: Decoder Distillation for
    Detection Transformer", IJCAI 2024, arXiv:2211.09768; neither the paper
    nor code. All weights are ours, untuned.
Schedule: 50 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.0001;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r50.checkpoint=FILE
Notes: the AP alone is second-hand, from a summary of KD-DETR; the zoo has no
    R-18. The decoder is run twice a step, and the queries of each of its
    layers are matched on the CPU.
"""

_base_ = '../_base_/students/dab-detr_r18_8xb2-50e.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r50=dict(
            config='mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/dab_detr/'
                'dab-detr_r50_8xb2-50e_coco/'
                'dab-detr_r50_8xb2-50e_coco_20221122_120837-c1035c8c.pth'
            ),
        )
    ),
    terms=dict(d3etr=dict(type='mmkd.D3ETRTerm', teacher='r50')),
)
