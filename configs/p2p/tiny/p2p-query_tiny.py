"""P2P: a tiny Deformable DETR, a peer and a frozen teacher answer alike."""

_base_ = '../../_base_/tiny/deformable_detr.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        p2p=dict(
            type='mmkd.PeersTerm',
            teacher='big',
            peers=dict(
                b=dict(config='configs/_base_/tiny/deformable_detr.py')
            ),
            warmup_iters=60,
        ),
    ),
)
