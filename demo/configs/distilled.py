"""The same student distilled: the teacher's head to start from, and PKD.

Differs from ``student.py`` in ``model`` alone.
"""

_base_ = 'student.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        lite=dict(
            config='demo/configs/teacher.py',
            checkpoint='work_dirs/demo/teacher/iter_600.pth',
            inherit=('bbox_head',),
        )
    ),
    terms=dict(
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='lite',
            tap='neck',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.PKDLoss', loss_weight=6.0),
        )
    ),
)
