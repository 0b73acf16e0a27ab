r"""P2P: RetinaNet R-50 (36.5 AP alone) learns from two peers and R-101.

python tools/train.py \
    configs/p2p/p2p_retinanet_r50-from-r101-and-peers_fpn_1x_coco.py

Family: procedure, by PeersTerm.
Published: none of this pair; the paper has polyps and tissue.
Trained by us: no.
Read: a description of the paper, not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none, it learns at the same time.
Notes: four detectors are trained at once. All weights are ours and untuned.
    tools/export_peer.py writes the best student as a plain checkpoint.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        p2p=dict(
            type='mmkd.PeersTerm',
            peers=dict(
                r50=dict(
                    config='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
                ),
                r18=dict(
                    config='mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
                ),
            ),
            online_teacher=dict(
                config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'
            ),
            alpha=1.0,
            beta=1.0,
            temperature=3.0,
        )
    ),
)
