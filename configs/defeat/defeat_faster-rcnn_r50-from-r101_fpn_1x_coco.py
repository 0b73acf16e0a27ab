r"""DeFeat: Faster R-CNN R-50 (37.4 AP alone) learns from R-101 (39.8 AP).

python tools/train.py \
    configs/defeat/defeat_faster-rcnn_r50-from-r101_fpn_1x_coco.py

Family: focal region.
Published: 40.9 AP, the paper's abstract, which does not name the teacher.
Trained by us: no.
Read: the authors' config for Faster R-CNN on VOC
    (https://github.com/ggjy/DeFeat.pytorch), from which all settings are; not
    the paper. Weights for COCO are not published with the code.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the part on the neck alone, which is all that the authors' config
    switches on; with that on proposals it is defeat-proposal_….
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

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
        )
    ),
    terms=dict(
        defeat=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=256,
                out_channels=256,
                kernel_size=3,
            ),
            loss=dict(
                type='mmkd.DeFeatLoss',
                foreground_weight=3.0,
                background_weight=12.0,
                finest_scale=56,
            ),
        )
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
