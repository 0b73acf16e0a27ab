"""MaKD: a tiny RetinaNet on a factorized Swin learns from the whole one."""

_base_ = '../../_base_/tiny/retinanet_swin_lowrank.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        whole=dict(_base_.teacher, inherit=('backbone', 'neck', 'bbox_head'))
    ),
    terms=dict(
        aspects=dict(
            type='mmkd.MultiAspectTerm', teacher='whole', loss_weight=10.0
        ),
        scores=dict(
            type='mmkd.FeatureTerm',
            teacher='whole',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=6),
            schedule=dict(type='mmkd.Between', begin=0.2),
        ),
    ),
)
