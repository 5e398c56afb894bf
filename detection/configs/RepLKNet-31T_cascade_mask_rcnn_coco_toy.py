"""A toy Cascade Mask R-CNN on drawn rectangles in COCO's layout. Data: python detection/toy_data.py."""
_base_ = './RepLKNet_cascade_mask_rcnn_coco.py'

classes = dict(classes=('red', 'green', 'blue'))
bbox_head = _base_.model.roi_head.bbox_head
for head in bbox_head:
    head.update(num_classes=3, num_shared_convs=1, in_channels=32, conv_out_channels=32, fc_out_channels=64)
rcnn = _base_.model.train_cfg.rcnn
for stage in rcnn:
    stage.sampler.num = 64
model = dict(
    backbone=dict(layers=[1, 1, 2, 1], channels=[16, 32, 64, 128], drop_path_rate=0.1),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=bbox_head,
        mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32, num_classes=3)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=200), rcnn=rcnn),
    # so that mAP is always computed
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=200), rcnn=dict(score_thr=0.0)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(128, 96), (160, 128)], keep_ratio=True),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='toy_data/coco/', metainfo=classes, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='toy_data/coco/', metainfo=classes, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='toy_data/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator

randomness = dict(seed=0)
max_epochs = 10
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=5), logger=dict(interval=4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, begin=0, end=5, by_epoch=False),
    dict(type='MultiStepLR', milestones=[8], gamma=0.1, begin=0, end=max_epochs, by_epoch=True)]
