"""Predicted: a tiny RetinaNet learns from what a Faster R-CNN detects."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        big=dict(
            config='configs/_base_/tiny/faster_rcnn_teacher.py',
            checkpoint='work_dirs/tiny/teachers/faster_rcnn/iter_640.pth',
        )
    ),
    terms=dict(
        predicted=dict(
            type='mmkd.PredictedBoxTerm', teacher='big', score_thr=0.1
        )
    ),
)
