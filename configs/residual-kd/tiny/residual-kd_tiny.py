"""Residual-KD: a tiny RetinaNet with an assistant, one stage at a time."""

_base_ = '../../_base_/tiny/retinanet_assisted_restarts.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        **{
            f'main{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                tap='backbone.main',
                teacher_tap='backbone',
                levels=(i,),
                loss=dict(type='mmkd.MimicLoss'),
            )
            for i in (0, 1, 2)
        },
        **{
            f'residual{i}': dict(
                type='mmkd.ResidualTerm', teacher='big', levels=(i,)
            )
            for i in (0, 1, 2)
        },
    ),
    phases=[
        *[
            dict(
                length=15,
                train=(
                    *[f'backbone.{branch}.net.{part}' for part in stage],
                    f'backbone.{branch}.laterals.{i}',
                ),
                terms=f'{term}{i}',
                supervised=False,
            )
            for i, stage in enumerate(
                [
                    ('conv1', 'bn1', 'layer1', 'layer2'),
                    ('layer3',),
                    ('layer4',),
                ]
            )
            for branch, term in (('main', 'main'), ('assistant', 'residual'))
        ],
        dict(length=70, train=('neck', 'bbox_head'), terms=()),
    ],
)
