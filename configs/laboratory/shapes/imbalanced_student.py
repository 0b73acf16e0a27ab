"""Shapes: of the student's last class a twentieth of the objects is left."""

_base_ = 'student.py'

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmkd.ImbalancedSubset',
        dataset=_base_.train_dataloader.dataset,
        factor=20,
    )
)
