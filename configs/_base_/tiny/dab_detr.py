"""Tiny DAB-DETR: twenty queries, two layers of 32, one level of stride 16."""

_base_ = 'runtime.py'

teacher = dict(
    config='configs/_base_/tiny/dab_detr_teacher.py',
    checkpoint='work_dirs/tiny/teachers/dab_detr/iter_640.pth',
)

relates = dict(embed_dims=32, num_heads=4, attn_drop=0.0, proj_drop=0.0)
ffn = dict(
    embed_dims=32,
    feedforward_channels=64,
    ffn_drop=0.0,
    act_cfg=dict(type='PReLU'),
)

model = dict(
    type='DABDETR',
    num_queries=20,
    data_preprocessor=_base_.pixels,
    backbone=dict(
        _base_.backbone,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[32],
        kernel_size=1,
        out_channels=32,
        act_cfg=None,
        norm_cfg=None,
        num_outs=1,
    ),
    encoder=dict(
        num_layers=1,
        layer_cfg=dict(
            self_attn_cfg=dict(
                embed_dims=32, num_heads=4, dropout=0.0, batch_first=True
            ),
            ffn_cfg=ffn,
        ),
    ),
    decoder=dict(
        num_layers=2,
        query_dim=4,
        query_scale_type='cond_elewise',
        with_modulated_hw_attn=True,
        layer_cfg=dict(
            self_attn_cfg=dict(relates, cross_attn=False),
            cross_attn_cfg=dict(relates, cross_attn=True),
            ffn_cfg=ffn,
        ),
        return_intermediate=True,
    ),
    positional_encoding=dict(num_feats=16, temperature=20, normalize=True),
    bbox_head=dict(
        type='DABDETRHead',
        num_classes=6,
        embed_dims=32,
        loss_cls=dict(
            type='FocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=1.0,
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0, eps=1e-8),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=20),
)
