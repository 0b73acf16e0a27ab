"""Deformable DETR of the zoo, its transformer of half as many weights."""

_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

model = dict(
    type='mmkd.Factorized',
    detector='DeformableDETR',
    rank_ratio=0.5,
    parts=('encoder', 'decoder'),
)
