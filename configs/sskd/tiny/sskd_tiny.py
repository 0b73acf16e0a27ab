"""SSKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet_restarts.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        **{
            f'stage{i}': dict(
                type='mmkd.FeatureTerm',
                teacher='big',
                tap=f'backbone.layer{i}',
                levels=(0,),
                align=dict(
                    type='mmkd.ConvAdapt',
                    in_channels=4 * 2**i,
                    out_channels=8 * 2**i,
                ),
                loss=dict(type='mmkd.MimicLoss'),
            )
            for i in (1, 2, 3, 4)
        },
        pyramid=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='neck',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.MimicLoss'),
        ),
    ),
    phases=[
        dict(
            length=15,
            train=('backbone.conv1', 'backbone.bn1', 'backbone.layer1'),
            terms='stage1',
            supervised=False,
        ),
        *[
            dict(
                length=15,
                train=f'backbone.layer{i}',
                terms=f'stage{i}',
                supervised=False,
            )
            for i in (2, 3, 4)
        ],
        dict(length=20, train='neck', terms='pyramid', supervised=False),
        dict(length=80, train='bbox_head', terms=()),
    ],
)
