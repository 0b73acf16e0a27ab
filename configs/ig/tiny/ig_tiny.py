"""KD with integrated gradients: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

prepare = [
    f'tools/attribute.py {_base_.teacher.config} {_base_.teacher.checkpoint} '
    f'--out work_dirs/tiny/attribution_gfl --overwrite-if-changed'
]

maps = dict(type='mmkd.LoadIGMap', ig_dir='work_dirs/tiny/attribution_gfl')
overlay = dict(type='mmkd.IGOverlay', prob=0.1, alpha=0.5, power=(1, 2))
keys = ['img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor']
keys += ['flip', 'flip_direction', 'teacher_img']  # the image without the map
pack = dict(type='PackDetInputs', meta_keys=keys)

pipeline = [*_base_.train_pipeline[:2], maps, _base_.train_pipeline[2]]
pipeline += [overlay, pack]
train_dataloader = dict(dataset=dict(pipeline=pipeline))

target = dict(type='mmkd.FeatureTerm', teacher='big', tap='bbox_head')
model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cls=dict(
            **target,
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=6, temperature=2.5
            ),
        ),
        box=dict(
            **target,
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=10.0, loss_weight=0.25),
        ),
    ),
)
