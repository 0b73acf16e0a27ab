r"""MMKD: RetinaNet R-50 (37.4 AP alone) learns from two (38.9, 41.0 AP).

python tools/train.py \
    configs/mmkd-meta/mmkd-meta_retinanet_r50-from-r101-and-x101_fpn_2x_coco.py

Family: group, by MetaTeachersTerm.
Published: none on detection.
Trained by us: no.
Read: a description of the authors' code (Rorozhl/MMKD), not the paper. From
    there are the temperature, the steps in thought, and the nets' optimiser.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your files:
    --cfg-options model.teachers.r101.checkpoint=FILE
    model.teachers.x101.checkpoint=FILE
Notes: the weights of the parts and the interval between lessons are ours and
    untuned. A lesson is about four passes of neck and head, forward and
    twice backward, every 50 steps.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_r101_fpn_2x_coco/'
                'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
            ),
        ),
        x101=dict(
            config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
                'retinanet_x101_64x4d_fpn_1x_coco/'
                'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth'
            ),
        ),
    ),
    terms=dict(
        meta=dict(
            type='mmkd.MetaTeachersTerm',
            teachers=('r101', 'x101'),
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=256,
                out_channels=256,
                convs=2,
            ),
            feature_weight=5.0,
            meta_interval=50,
            buffer_size=64,
        ),
    ),
)
