r"""MTPD: RetinaNet R-50 (37.4 AP alone) learns from two (38.9, 41.0 AP).

python tools/train.py \
    configs/mtpd/mtpd_retinanet_r50-from-r101-then-x101_fpn_2x_coco.py

Family: group, by MGDLoss.
Idea: Several teachers in turn, the nearer one first.
Published: 41.7 AP, the authors' README, in two trainings of 12 epochs each.
Trained by us: no.
Read: the authors' README (Cao et al., "Learning Lightweight Object Detectors
    via Multi-Teacher Progressive Distillation", ICML 2023, arXiv:2308.09105);
    the loss is MGD with its authors' settings for one stage.
Schedule: 24 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: optim_wrapper.clip_grad.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your files:
    --cfg-options model.teachers.r101.checkpoint=FILE
    model.teachers.x101.checkpoint=FILE
Notes: the nearer teacher first. The authors begin the learning rate anew with
    the second teacher; here one schedule spans both halves. For theirs, train
    twice for 12 epochs with one teacher each, the second time with
    --cfg-options load_from=FIRST_CHECKPOINT. Only the teacher whose turn it is
    runs.
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
        r101=dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.MGDLoss',
                channels=256,
                loss_weight=2e-5,
                mask_ratio=0.65,
            ),
            schedule=dict(type='mmkd.Between', begin=0.0, end=0.5),
        ),
        x101=dict(
            type='mmkd.FeatureTerm',
            teacher='x101',
            tap='neck',
            levels=(0, 1, 2, 3, 4),
            loss=dict(
                type='mmkd.MGDLoss',
                channels=256,
                loss_weight=2e-5,
                mask_ratio=0.65,
            ),
            schedule=dict(type='mmkd.Between', begin=0.5, end=1.0),
        ),
    ),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
