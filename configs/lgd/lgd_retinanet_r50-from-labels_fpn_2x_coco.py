r"""LGD: RetinaNet R-50 (37.4 AP alone) learns from its labels.

python tools/train.py configs/lgd/lgd_retinanet_r50-from-labels_fpn_2x_coco.py

Family: feature, by LabelGuidedTerm.
Published: 39.0 AP where the student alone has 36.2 (arXiv:2109.11496,
    abstract), with a backbone that is frozen for the first 70000 of 180000
    steps, which is not done here.
Trained by us: no.
Read: the abstract, and the authors' configs and code
    (https://github.com/megvii-research/LGD).
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none, there is no teacher.
Notes: the student imitates after a sixth of the training.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        lgd=dict(
            type='mmkd.LabelGuidedTerm',
            num_classes=80,
            channels=256,
            heads=8,
            context=True,
            begin=1 / 6,
        ),
    ),
)
