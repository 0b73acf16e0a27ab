r"""GO-LSD: Deformable DETR R-50 (46.2 AP alone) learns from its last layer.

python tools/train.py \
    configs/go-lsd/go-lsd_deformable-detr-refine_r50-from-itself_50e_coco.py

Family: query, by LayerSelfTeachingTerm.
Published: none for this detector; D-FINE, which has distributions of edges,
    is trained by it (arXiv:2410.13842).
Trained by us: no.
Read: summaries of arXiv:2410.13842; no code.
Schedule: 50 epochs of 32 images a step (16 GPUs x 2) at learning rate 0.0002;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none, there is no teacher.
Notes: boxes by DETR's distances, as the head has no distributions.
"""

_base_ = 'mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(golsd=dict(type='mmkd.LayerSelfTeachingTerm')),
)
