r"""Stored: RTMDet tiny (40.9 AP alone) learns from RTMDet x (52.6 AP).

python tools/train.py \
    configs/stored/stored_rtmdet_tiny-from-x_pafpn_300e_coco.py

Family: response, by StoredPredictionTerm.
Published: none on detection.
Trained by us: no.
Read: the paper's abstract (arXiv:2112.01528), of classification; the form for
    detectors and its weights are ours.
Schedule: 300 epochs of 256 images a step (8 GPUs x 32) at learning rate 0.004;
    with another number of images add --auto-scale-lr.
Changed besides model: auto_scale_lr.base_batch_size, custom_hooks, prepare,
    train_dataloader.dataset.pipeline.
Teacher's weights: MMDetection's zoo, downloaded by the command that stands
    under prepare; type it first, behind python.
Notes: a forward pass of RTMDet-x has 142 GFLOPs, one of the student 8.1, by
    MMDetection's README. Here it looks at each image once, and 100 cells of it
    are kept, 8 kB on disk; mosaic, crops and mixed images move them with the
    pixels. No teacher is in memory. MMDetection's config says 16 images a step
    for --auto-scale-lr, and trains with 256.
"""

_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

auto_scale_lr = dict(base_batch_size=256)

prepare = [
    'tools/cache_predictions.py mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py '
    'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
    'rtmdet_x_8xb32-300e_coco/'
    'rtmdet_x_8xb32-300e_coco_20220715_230555-cc79b9ae.pth '
    '--out work_dirs/predictions/rtmdet_x_coco --overwrite-if-changed'
]

# Behind the annotations, and behind all that moves pixels.
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            *_base_.train_pipeline[:2],
            dict(type='mmkd.TrackPixels'),
            *_base_.train_pipeline[2:],
            dict(
                type='mmkd.LoadPredictions',
                folder='work_dirs/predictions/rtmdet_x_coco',
            ),
        ]
    )
)
custom_hooks = [
    _base_.custom_hooks[0],
    dict(
        type='PipelineSwitchHook',
        switch_epoch=_base_.custom_hooks[1].switch_epoch,
        switch_pipeline=[
            *_base_.train_pipeline_stage2[:2],
            dict(type='mmkd.TrackPixels'),
            *_base_.train_pipeline_stage2[2:],
            dict(
                type='mmkd.LoadPredictions',
                folder='work_dirs/predictions/rtmdet_x_coco',
            ),
        ],
    ),
]

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        stored=dict(type='mmkd.StoredPredictionTerm'),
    ),
)
