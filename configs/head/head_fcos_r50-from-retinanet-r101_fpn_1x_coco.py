r"""HEAD: FCOS R-50 (36.6 AP alone) learns from RetinaNet R-101 (38.9 AP).

python tools/train.py \
    configs/head/head_fcos_r50-from-retinanet-r101_fpn_1x_coco.py

Family: response, by AssistantTerm.
Published: no result for this pair that we know of.
Trained by us: no.
Read: the abstract of arXiv:2207.05345; all settings are ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: student and teacher have the strides 8 to 128 in common, and nothing
    of their heads. The assistant is a RetinaNet head on the student's neck; it
    learns from the labels, and its scores and boxes from the teacher's. It is
    dropped after training.
"""

_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'

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
    ),
    terms=dict(
        assistant=dict(
            type='mmkd.AssistantTerm',
            teacher='r101',
            tap='neck',
            terms=dict(
                cls=dict(
                    type='mmkd.FeatureTerm',
                    teacher='r101',
                    tap='bbox_head',
                    output=0,
                    levels=(0, 1, 2, 3, 4),
                    loss=dict(type='mmkd.BCKDClassLoss', num_classes=80),
                ),
                box=dict(type='mmkd.BoxTerm', teacher='r101', loss_weight=4.0),
            ),
        ),
    ),
)
