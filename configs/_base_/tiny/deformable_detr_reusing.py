"""Tiny Deformable DETR with a decoder as deep as its teacher's."""

_base_ = 'deformable_detr.py'

model = dict(decoder=dict(num_layers=3))
