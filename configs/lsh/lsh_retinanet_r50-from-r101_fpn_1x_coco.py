"""LSH: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/lsh/lsh_retinanet_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: none on COCO; on VOC07 RetinaNet R-50 from R-101 has 83.0 AP50
    (82.5 alone, 82.6 with the squared distance alone).
Trained by us: no.
Read: what the authors' code does (https://github.com/DoctorKey/LSHFM.detection)
    in a summary of it, from which both settings of the loss are; not the
    paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors train for 24 epochs of VOC07+12 at 0.005. The hashes of a
    batch take about 3 GB; lower hash_num for less.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

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
        )
    ),
    terms=dict(
        lsh=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head.cls_convs.3',  # the last before retina_cls
            levels=(0, 1, 2, 3, 4),
            weight=dict(type='mmkd.DecidedWeight'),
            loss=dict(
                type='mmkd.LSHLoss',
                channels=256,
                mode='lshl2',
                hash_num=4096,
                bias='zero',
                unfold=3,
                loss_weight=7.0,
            ),
        ),
    ),
)
