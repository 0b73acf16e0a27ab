r"""Score-L2: RTMDet s (44.5 AP alone) learns from RTMDet m (49.1 AP).

python tools/train.py \
    configs/score-l2/score-l2_rtmdet_s-from-m_pafpn_300e_coco.py

Family: focal region, by WeightedMSELoss.
Source: Ultralytics,
    https://docs.ultralytics.com/guides/knowledge-distillation
Published: no pair of MMDetection; Ultralytics' guide on knowledge distillation
    has 49.2 AP for YOLO26s, which alone has 48.6 AP, from YOLO26m.
Trained by us: no.
Read: that guide and a summary of the loss, which is the squared error of each
    level weighted by the teacher's largest class probability at each cell,
    behind two 1x1 convolutions of the student; no code was read.
Schedule: 300 epochs of 256 images a step (8 GPUs x 32) at learning rate 0.004;
    with another number of images add --auto-scale-lr.
Changed besides model: auto_scale_lr.base_batch_size.
Teacher's weights: MMDetection's zoo, downloaded at the start; or your file:
    --cfg-options model.teachers.m.checkpoint=FILE
Notes: the weight 1 is ours and untried. Weights sum over the images of a GPU,
    so that one without objects hardly counts. MMDetection's config says 16
    images a step for --auto-scale-lr, and trains with 256.
"""

_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

auto_scale_lr = dict(base_batch_size=256)

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        m=dict(
            config='mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py',
            checkpoint=(
                'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/'
                'rtmdet_m_8xb32-300e_coco/'
                'rtmdet_m_8xb32-300e_coco_20220719_112220-229f527c.pth'
            ),
        )
    ),
    terms=dict(
        score_l2=dict(
            type='mmkd.FeatureTerm',
            teacher='m',
            tap='neck',
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=128,
                out_channels=192,
                convs=2,
            ),
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.WeightedMSELoss', loss_weight=1.0),
        )
    ),
)
