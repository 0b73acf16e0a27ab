"""Balanced: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        both=dict(
            type='mmkd.BalancedTerm',
            share=dict(pkd=1.0, scores=0.5),
            terms=dict(
                pkd=dict(
                    type='mmkd.FeatureTerm',
                    teacher='big',
                    loss=dict(type='mmkd.PKDLoss'),
                ),
                scores=dict(
                    type='mmkd.FeatureTerm',
                    teacher='big',
                    tap='bbox_head',
                    output=0,
                    loss=dict(type='mmkd.CWDLoss'),
                ),
            ),
        ),
    ),
)
