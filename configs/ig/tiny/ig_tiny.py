"""KD with integrated gradients: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

prepare = [
    f'tools/attribute.py {_base_.teacher.config} {_base_.teacher.checkpoint} '
    f'--out work_dirs/tiny/attribution_gfl --overwrite-if-changed'
]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='mmkd.LoadIGMap',
                ig_dir='work_dirs/tiny/attribution_gfl',
            ),
            dict(type='RandomFlip', prob=0.5),
            dict(type='mmkd.IGOverlay', prob=0.1, alpha=0.5, power=(1, 2)),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    *('img_id', 'img_path', 'ori_shape', 'img_shape'),
                    *('scale_factor', 'flip', 'flip_direction'),
                    'teacher_img',  # without the map
                ),
            ),
        ]
    )
)
model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cls=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss',
                num_classes=6,
                activation='sigmoid',
                temperature=2.5,
                weight_by='teacher',
                loss_weight=1.0,
            ),
        ),
        box=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=10.0, loss_weight=0.25),
        ),
    ),
)
