r"""UHKD: Faster R-CNN R-50 (37.4 AP alone) learns from Swin-T (42.7 AP).

python tools/train.py \
    configs/uhkd/uhkd_faster-rcnn_r50-from-mask-swin-t_fpn_1x_coco.py

Family: feature.
Published: none on detection; the paper's results are for classifiers.
Trained by us: no.
Read: an outline of Yu et al., "UHKD: A Unified Framework for Heterogeneous
    Knowledge Distillation via Frequency-Domain Representations",
    arXiv:2510.24116; there is no code of the authors that we know of.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.02;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.swin.checkpoint=FILE
Notes: the teacher is a Mask R-CNN with a Swin transformer. Stages C3 to C5
    are compared, as C2 rests in the student; the scores are those of the
    student's proposals. Both weights are untuned.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        swin=dict(
            config='mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/swin/'
                'mask_rcnn_swin-t-p4-w7_fpn_1x_coco/'
                'mask_rcnn_swin-t-p4-w7_fpn_1x_coco_'
                '20210902_120937-9d6b7cfa.pth'
            ),
        )
    ),
    terms=dict(
        uhkd=dict(
            type='mmkd.FeatureTerm',
            teacher='swin',
            tap='backbone',
            levels=(1, 2, 3),
            align=dict(
                type='mmkd.SpectralAdapt',
                in_channels=(512, 1024, 2048),
                out_channels=(192, 384, 768),
            ),
            loss=dict(
                type='mmkd.UHKDLoss',
                grid=(32, 32),
                keep=(16, 16),
                sigma=0.5,
                component='amplitude',
                loss_weight=1.0,
            ),
        ),
        soft_target=dict(
            type='mmkd.ProposalTerm',
            teacher='swin',
            cls_loss=dict(
                type='mmkd.SoftTargetLoss',
                activation='softmax',
                weight_by='uniform',
            ),
        ),
    ),
)
