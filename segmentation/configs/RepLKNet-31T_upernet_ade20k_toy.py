"""A toy in ADE20K's layout: 60 iterations on drawn rectangles. Data: python segmentation/toy_data.py."""
_base_ = './RepLKNet-31B_1Kpretrain_upernet_160k_ade20k_512.py'

crop_size = (64, 64)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(layers=[1, 1, 2, 1], channels=[16, 32, 64, 128], drop_path_rate=0.1),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=32),
    auxiliary_head=dict(in_channels=64, channels=32))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(256, 64), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 64), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(256 * ratio), int(64 * ratio)), keep_ratio=True)
    for ratio in _base_.img_ratios]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='toy_data/ade20k', pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='toy_data/ade20k', pipeline=test_pipeline))
test_dataloader = val_dataloader

randomness = dict(seed=0)
max_iters = 60
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_iters=max_iters, val_interval=30)
default_hooks = dict(checkpoint=dict(interval=30), logger=dict(interval=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=5, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=5, end=max_iters, by_epoch=False)]
