"""RetinaNet R-18, its backbone cut into a student and an assistant.

Three and one quarter of the width, which together cost no more than the whole;
both begin with random weights.
"""

_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

branch = dict(
    type='ResNet',
    depth=18,
    num_stages=4,
    out_indices=(1, 2, 3),
    frozen_stages=-1,
    norm_cfg=dict(type='BN', requires_grad=True),
    norm_eval=False,
    style='pytorch',
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmkd.ResidualBackbone',
        main=dict(branch, base_channels=48, stem_channels=48),
        assistant=dict(branch, base_channels=16, stem_channels=16),
        out_channels=(512, 1024, 2048),
    ),
    neck=dict(in_channels=[512, 1024, 2048], start_level=0),
)
