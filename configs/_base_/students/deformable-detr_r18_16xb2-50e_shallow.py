"""Deformable DETR of the zoo, with R-18 and three layers instead of six."""

_base_ = 'deformable-detr_r18_16xb2-50e.py'

model = dict(encoder=dict(num_layers=3), decoder=dict(num_layers=3))
