"""Self: a tiny GFL learns from the average of its past."""

_base_ = '../../_base_/tiny/gfl_falling.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        past=dict(
            type='mmkd.SelfTerm',
            terms=dict(
                pkd=dict(
                    type='mmkd.FeatureTerm',
                    teacher='self',
                    loss=dict(type='mmkd.PKDLoss', loss_weight=2.0),
                )
            ),
            average=dict(type='ExponentialMovingAverage', momentum=0.1),
        ),
    ),
)
