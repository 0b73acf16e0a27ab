"""Foundation: a tiny GFL learns from a classifier of ImageNet."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        features=dict(
            type='mmkd.FoundationTerm',
            model=dict(type='mmkd.EfficientNetLite', pretrained='pypi'),
            in_channels=64,
            out_channels=320,
            patch=32,
        ),
    ),
)
