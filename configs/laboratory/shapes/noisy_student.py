"""Shapes: the student's training labels are wrong in three of ten cases."""

_base_ = 'student.py'

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmkd.NoisyLabels',
        dataset=_base_.train_dataloader.dataset,
        p=0.3,
        box_jitter=0.1,
    )
)
