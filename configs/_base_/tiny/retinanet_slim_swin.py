"""Tiny RetinaNet on a narrow Swin: windows of 4, few heads, from scratch."""

_base_ = 'retinanet.py'

teacher = dict(
    config='configs/_base_/tiny/retinanet_slim_swin_teacher.py',
    checkpoint='work_dirs/tiny/teachers/retinanet_slim_swin/iter_640.pth',
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=8,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
)
