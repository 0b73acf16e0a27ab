"""Stored: a tiny GFL learns what one twice as wide has said before."""

_base_ = '../../_base_/tiny/gfl.py'

folder = 'work_dirs/tiny/predictions_gfl'
prepare = [
    f'tools/cache_predictions.py {_base_.teacher.config} '
    f'{_base_.teacher.checkpoint} --out {folder} --overwrite-if-changed'
]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='mmkd.TrackPixels'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
            dict(type='mmkd.LoadPredictions', folder=folder),
        ]
    )
)

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        stored=dict(type='mmkd.StoredPredictionTerm'),
    ),
)
