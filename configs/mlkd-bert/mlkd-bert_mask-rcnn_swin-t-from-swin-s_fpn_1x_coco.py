r"""MLKD-BERT: Mask R-CNN Swin-T (42.7 AP alone) learns from Swin-S (48.2 AP).

python tools/train.py \
    configs/mlkd-bert/mlkd-bert_mask-rcnn_swin-t-from-swin-s_fpn_1x_coco.py

Family: relational, by MLKDBertLayersTerm.
Published: none on detection; the method is one for language models.
Trained by us: no.
Read: a summary of Zhang et al., arXiv:2407.02775; no code is known.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.0001;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.swin_s.checkpoint=FILE
Notes: the backbone imitates layers for 4 epochs without labels, then all
    learns from objects, soft targets and labels for 8. Several GPUs need
    --cfg-options find_unused_parameters=True. AP above is of boxes; of masks
    it is 39.3 alone and 43.2 for the teacher, which saw images of many sizes
    for 36 epochs. The parts are added as in the paper; lengths are ours.
"""

_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        swin_s=dict(
            config=(
                'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'
            ),
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/swin/'
                'mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/'
                'mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_'
                '20210903_104808-b92c91f1.pth'
            ),
        )
    ),
    terms=dict(
        layers=dict(
            type='mmkd.MLKDBertLayersTerm',
            teacher='swin_s',
            student_channels=(96, 192, 384, 768),
            teacher_channels=(96, 192, 384, 768),
        ),
        samples=dict(
            type='mmkd.FeatureTerm',
            teacher='swin_s',
            tap='neck',
            levels=(0, 1, 2, 3),
            loss=dict(
                type='mmkd.MLKDBertSampleLoss',
                student_channels=256,
                teacher_channels=256,
            ),
        ),
        kd=dict(
            type='mmkd.ProposalTerm',
            teacher='swin_s',
            cls_loss=dict(
                type='mmkd.SoftTargetLoss',
                activation='softmax',
                temperature=2.0,
                weight_by='uniform',
            ),
            box_weight=1.0,
        ),
    ),
    phases=[
        dict(
            length=4,
            train=('backbone.patch_embed', 'backbone.stages'),
            terms='layers',
            supervised=False,
        ),
        dict(length=8, terms=('samples', 'kd')),
    ],
)
