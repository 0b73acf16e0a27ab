"""MMKD: a tiny RetinaNet learns from one twice as wide and a GFL."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        big=_base_.teacher,
        gfl=dict(
            config='configs/_base_/tiny/gfl_teacher.py',
            checkpoint='work_dirs/tiny/teachers/gfl/iter_640.pth',
        ),
    ),
    terms=dict(
        meta=dict(
            type='mmkd.MetaTeachersTerm',
            teachers=('big', 'gfl'),
            output_teachers=('big',),
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=32,
                out_channels=32,
                convs=2,
            ),
            feature_weight=5.0,
            meta_interval=10,
            meta_batch=4,
            buffer_size=32,
        ),
    ),
)
