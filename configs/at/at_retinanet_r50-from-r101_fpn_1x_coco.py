"""AT: RetinaNet R-50 (36.5 AP alone) learns from R-101 (38.9 AP).

python tools/train.py configs/at/at_retinanet_r50-from-r101_fpn_1x_coco.py

Family: feature.
Published: no result for a detector that we know of; the method is one for
    classifiers.
Trained by us: no.
Read: the loss in MMRazor's and the authors' form, known second-hand; not the
    paper.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the weight is that of the authors' CIFAR-10 runs and untuned for
    detection: on a level of n cells the loss is at most 2 / n. P7, with the
    fewest, is left out so that it does not outweigh the others.
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
        at=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(type='mmkd.ATLoss', loss_weight=1000.0),
        )
    ),
)
