"""HEAD: a tiny RetinaNet learns from a GFL twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        big=dict(
            config='configs/_base_/tiny/gfl_teacher.py',
            checkpoint='work_dirs/tiny/teachers/gfl/iter_640.pth',
        ),
    ),
    terms=dict(
        head=dict(
            type='mmkd.AssistantTerm',
            teacher='big',
            terms=dict(
                scores=dict(
                    type='mmkd.FeatureTerm',
                    teacher='big',
                    tap='bbox_head',
                    output=0,
                    loss=dict(type='mmkd.CWDLoss', loss_weight=5.0),
                )
            ),
        ),
    ),
)
