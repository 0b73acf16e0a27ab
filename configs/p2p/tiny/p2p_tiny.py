"""P2P: a tiny RetinaNet, a peer and one twice as wide learn together."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        p2p=dict(
            type='mmkd.PeersTerm',
            peers=dict(b=dict(config='configs/_base_/tiny/retinanet.py')),
            online_teacher=dict(
                config='configs/_base_/tiny/retinanet_teacher.py'
            ),
            warmup_iters=60,
        ),
    ),
)
