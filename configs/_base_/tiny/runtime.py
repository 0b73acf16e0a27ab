"""What tiny configs share: pixels, backbone, data, 160 steps of 8 pictures.

The pictures are drawn by `make test-all`, or by
`python tools/prepare_data.py shapes --out data/shapes_tiny --size 96
--train 64 --val 16 --test 16`.
"""

_base_ = 'mmdet::_base_/default_runtime.py'

data_root = 'data/shapes_tiny/'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'plus', 'star', 'crescent')
)
iterations = 160

pixels = dict(
    type='DetDataPreprocessor',
    mean=[127, 127, 127],
    std=[64, 64, 64],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)
backbone = dict(
    type='ResNet',
    depth=18,
    base_channels=8,
    stem_channels=8,
    out_indices=(1, 2, 3),
    frozen_stages=-1,
    style='pytorch',
)
neck = dict(type='FPN', in_channels=[16, 32, 64], out_channels=32, num_outs=3)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96)),  # heads ask for the factor
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='test.json',
        data_prefix=dict(img='test/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'test.json', metric='bbox'
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10)
]
#: For those that learn from what moves as well.
falling = [
    *param_scheduler,
    dict(
        type='CosineAnnealingLR',
        T_max=iterations - 10,
        by_epoch=False,
        begin=10,
        end=iterations,
    ),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=5, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=iterations,
        max_keep_ckpts=1,
    ),
)
log_processor = dict(type='LogProcessor', window_size=5, by_epoch=False)
randomness = dict(seed=0, deterministic=True)
