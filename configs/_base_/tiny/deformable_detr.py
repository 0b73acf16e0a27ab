"""Tiny Deformable DETR: twenty queries, two layers of 32, three levels."""

_base_ = 'runtime.py'

teacher = dict(
    config='configs/_base_/tiny/deformable_detr_teacher.py',
    checkpoint='work_dirs/tiny/teachers/deformable_detr/iter_640.pth',
)

looks = dict(embed_dims=32, num_heads=4, num_levels=3, batch_first=True)
ffn = dict(embed_dims=32, feedforward_channels=64, ffn_drop=0.0)
relates = dict(embed_dims=32, num_heads=4, dropout=0.0, batch_first=True)

model = dict(
    type='DeformableDETR',
    num_queries=20,
    num_feature_levels=3,
    with_box_refine=True,
    data_preprocessor=_base_.pixels,
    backbone=_base_.backbone,
    neck=_base_.neck,
    encoder=dict(
        num_layers=1,
        layer_cfg=dict(self_attn_cfg=looks, ffn_cfg=ffn),
    ),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=relates,
            cross_attn_cfg=looks,
            ffn_cfg=ffn,
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=16, normalize=True, offset=-0.5),
    bbox_head=dict(
        type='DeformableDETRHead',
        num_classes=6,
        embed_dims=32,
        loss_cls=dict(
            type='FocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=2.0,
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=20),
)
