"""RetinaNet R-18 as in the zoo, but all stages of the backbone learn."""

_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

model = dict(backbone=dict(frozen_stages=-1))
