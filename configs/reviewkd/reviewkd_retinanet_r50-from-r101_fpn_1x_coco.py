r"""ReviewKD: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py \
    configs/reviewkd/reviewkd_retinanet_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: no result that we have read; the authors have a config of this pair
    at several scales.
Trained by us: no.
Read: the authors' config of RetinaNet R-50 from R-101, from which weight and
    levels are, and their code (https://github.com/dvlab-research/ReviewKD);
    not the paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the authors train 180000 steps of 8 images at several scales, in
    Detectron2. Their batch norms in the fusions see two images a GPU, as here.
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
        reviewkd=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.ReviewKDLoss',
                in_channels=(256,) * 5,
                mid_channels=256,
                loss_weight=1.0,
            ),
        )
    ),
)
