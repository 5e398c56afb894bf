"""RepLKNet-31L (ImageNet-22K), ADE20K at 640 x 640.

Published: mIoU 52.4 single-scale, 52.7 multi-scale; 207M parameters.
5.12 million images: 80,000 iterations on 64 GPUs x 1 image, as published. With another GPUs x batch,
max_iters is 5,120,000 / (GPUs x batch).
"""
_base_ = './RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640.py'

model = dict(
    backbone=dict(channels=[192, 384, 768, 1536]),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768))

max_iters = 80000
train_dataloader = dict(batch_size=1)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=800, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=800, end=max_iters, by_epoch=False)]
