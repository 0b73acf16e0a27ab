"""Mask R-CNN Swin-T as in the zoo, its matrices of half as many weights."""

_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

model = dict(
    type='mmkd.Factorized',
    detector='MaskRCNN',
    rank_ratio=0.5,
    backbone=dict(drop_path_rate=0.0),  # both sides run the same blocks
)
