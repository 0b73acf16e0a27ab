"""MHD: GFL R-50 (40.2 AP alone) learns from R-101 (44.7 AP).

python tools/train.py configs/mhd/mhd_gfl_r50-from-r101_fpn_1x_coco.py

Family: procedure, by HypothesisDataset.
Published: none on detection.
Trained by us: no.
Read: the paper's abstract and an outline (arXiv:2507.21568); there is no code.
    Ten hypotheses are those of a re-implementation for text; what one is in
    an image, and how it is drawn, is ours.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: prepare, train_dataloader.dataset.
Teacher's weights: MMDetection's zoo, downloaded by the command that stands
    under prepare; type it first, behind python.
Notes: model is the student's own. The teacher is asked once, and not in
    memory while the student learns; no annotation is used.
"""

_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

prepare = [
    'tools/make_hypotheses.py mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py '
    'https://download.openmmlab.com/mmdetection/v2.0/gfl/'
    'gfl_r101_fpn_mstrain_2x_coco/'
    'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth '
    '--out work_dirs/hypotheses/gfl_r101_coco.json '
    '--generator sample --num-hypotheses 10 --overwrite-if-changed'
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmkd.HypothesisDataset',
        dataset=_base_.train_dataloader.dataset,
        cache_file='work_dirs/hypotheses/gfl_r101_coco.json',
    )
)
