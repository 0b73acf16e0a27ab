"""LSH of proposals: a tiny Faster R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/faster_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        lsh=dict(
            type='mmkd.ProposalFeatureTerm',
            teacher='big',
            loss=dict(
                type='mmkd.LSHLoss', channels=64, unfold=1, bias='median'
            ),
        ),
    ),
)
