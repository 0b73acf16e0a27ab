r"""SimKD: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/simkd/simkd_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: feature, by SimKDTerm.
Published: none on detection; on CIFAR-100 ResNet-8x4 learns from 32x4 to 78.08
    %, alone 73.09, the teacher 79.42, known second-hand.
Trained by us: no.
Read: descriptions of the paper and its code: Chen et al., "Knowledge
    Distillation with the Reused Teacher Classifier", CVPR 2022,
    arXiv:2203.14001.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: both heads are the teacher's, their weights never move, and no label is
    read. What is deployed has a projector, five times 0.2 M parameters.
    Published with weight 1 at learning rate 0.05; 2.5 at 0.02 keeps their
    product. Several GPUs need --cfg-options find_unused_parameters=True.
"""

_base_ = '../_base_/students/faster-rcnn_r50_fpn_1x_coco_projected.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
                'faster_rcnn_r101_fpn_2x_coco/'
                'faster_rcnn_r101_fpn_2x_coco_'
                'bbox_mAP-0.398_20200504_210455-1d2dac9c.pth'
            ),
            inherit=('rpn_head', 'roi_head'),
        )
    ),
    terms=dict(
        simkd=dict(
            type='mmkd.SimKDTerm',
            teacher='r101',
            reuse=('rpn_head', 'roi_head'),
            loss=dict(type='mmkd.MimicLoss', loss_weight=2.5),
        ),
    ),
    phases=[dict(train=('backbone', 'neck'), supervised=False)],
)
