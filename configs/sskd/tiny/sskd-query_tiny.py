"""SSKD: a tiny Deformable DETR learns from one that is wider and deeper."""

_base_ = '../../_base_/tiny/deformable_detr_restarts.py'

mimic = dict(
    type='mmkd.FeatureTerm',
    teacher='big',
    loss=dict(type='mmkd.MimicLoss'),
)
stages = {
    f'stage{i}': dict(
        mimic,
        tap=f'backbone.layer{i}',
        levels=(0,),
        align=dict(
            type='mmkd.ConvAdapt',
            in_channels=4 * 2**i,
            out_channels=8 * 2**i,
        ),
    )
    for i in (1, 2, 3, 4)
}
parts = dict(
    stage1=('backbone.conv1', 'backbone.bn1', 'backbone.layer1'),
    stage2='backbone.layer2',
    stage3='backbone.layer3',
    stage4='backbone.layer4',
    pyramid='neck',
    memory=('encoder', 'level_embed'),
)
rest = ('decoder', 'query_embedding', 'reference_points_fc', 'bbox_head')

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        **stages,
        pyramid=dict(mimic, tap='neck', levels=(0, 1, 2)),
        memory=dict(
            mimic, tap='encoder.layers.0', teacher_tap='encoder.layers.1'
        ),
    ),
    phases=[
        *[
            dict(length=15, train=part, terms=term, supervised=False)
            for term, part in parts.items()
        ],
        dict(length=70, train=rest, terms=()),
    ],
)
