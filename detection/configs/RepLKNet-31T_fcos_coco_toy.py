"""A toy FCOS on drawn rectangles in COCO's layout. Data: python detection/toy_data.py."""
_base_ = './RepLKNet-31B_1Kpretrain_fcos_2x_coco.py'

classes = dict(classes=('red', 'green', 'blue'))
model = dict(
    backbone=dict(layers=[1, 1, 2, 1], channels=[16, 32, 64, 128], drop_path_rate=0.1),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(num_classes=3, in_channels=32, feat_channels=64, stacked_convs=1),
    test_cfg=dict(score_thr=0.0))  # so that mAP is always computed

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoiceResize', scales=[(128, 96), (160, 128)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
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
    dict(type='ConstantLR', factor=1 / 3, begin=0, end=5, by_epoch=False),
    dict(type='MultiStepLR', milestones=[8], gamma=0.1, begin=0, end=max_epochs, by_epoch=True)]
