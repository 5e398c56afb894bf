"""RepLKNet-XL (MegData73M), ADE20K at 640 x 640.

Published: mIoU 55.2 single-scale, 56.0 multi-scale; 374M parameters.
5.12 million images: 160,000 iterations on 16 GPUs x 2 images, as published. With another GPUs x batch,
max_iters is 5,120,000 / (GPUs x batch). Pixels become -1 ... 1, in training and in testing, as in the
pretraining.
"""
_base_ = './RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640.py'

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        large_kernel_sizes=[27, 27, 27, 13],
        channels=[256, 512, 1024, 2048],
        drop_path_rate=0.5,
        small_kernel=None,
        dw_ratio=1.5,
        norm_intermediate_features=True),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024))

max_iters = 160000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=max_iters, by_epoch=False)]
