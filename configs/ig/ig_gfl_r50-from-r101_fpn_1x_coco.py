"""IG: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/ig/ig_gfl_r50-from-r101_fpn_1x_coco.py

Family: procedure, by IGOverlay.
Published: none on detection.
Trained by us: no.
Read: what the authors' code does
    (https://github.com/nordlinglab/ModelCompression-IntegratedGradients) in a
    summary of it, for classifiers (arXiv:2503.13008); not the paper. From it
    are share, strength and power of the overlay and the temperature of
    classes; the weights are not.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: prepare, train_dataloader.dataset.pipeline.
Teacher's weights: MMDetection's zoo, downloaded at the start and by the
    command that stands under prepare; type it first, behind python. Or your
    file there, and here: --cfg-options model.teachers.r101.checkpoint=FILE
Notes: the maps take 32 passes forth and back an image, about what 20 epochs
    of training cost the teacher; add --device cuda. The authors weigh the
    teacher by 0.01, with targets that seem to be of other images. Here it sees
    each image as the student does, less the map; the weights of both terms are
    untuned.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

prepare = [
    'tools/attribute.py mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py '
    'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
    'gfl_r101_fpn_mstrain_2x_coco/'
    'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth '
    '--out work_dirs/attribution/gfl_r101_coco --overwrite-if-changed'
]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile', backend_args=None),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='mmkd.LoadIGMap',
                ig_dir='work_dirs/attribution/gfl_r101_coco',
            ),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='mmkd.IGOverlay', prob=0.1, alpha=0.5, power=(1, 2)),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    *('img_id', 'img_path', 'ori_shape', 'img_shape'),
                    *('scale_factor', 'flip', 'flip_direction'),
                    'teacher_img',  # without the map
                ),
            ),
        ]
    )
)
model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        r101=dict(
            config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
                'gfl_r101_fpn_mstrain_2x_coco/'
                'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
            ),
        )
    ),
    terms=dict(
        cls=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=0,
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.SoftTargetLoss',
                num_classes=80,
                activation='sigmoid',
                temperature=2.5,
                weight_by='teacher',
                loss_weight=1.0,
            ),
        ),
        box=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(
                type='mmkd.LDLoss',
                temperature=10.0,
                average=False,
                loss_weight=0.25,
            ),
        ),
    ),
)
