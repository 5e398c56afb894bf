"""RepMLPNet-D256 (ImageNet-1K), UperNet, Cityscapes at 512 x 1024 pixels, two by four parts of its FCs.

The paper reports 76.27 mIoU for this backbone and head; its config was not published. Optimizer and schedule
are those of our RepLKNet configs with MMSegmentation's 80,000 iterations on 4 GPUs x 2 images: not trained.
Images are tested in windows of the crop's size, as they were trained.
"""
_base_ = ['./RepLKNet_upernet.py', 'mmseg::_base_/datasets/cityscapes.py']
custom_imports = dict(imports=['segmentation.repmlpnet'], allow_failed_imports=False)

crop_size = (512, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,
        type='RepMLPNet',
        channels=[80, 160, 320, 640],
        num_blocks=[2, 2, 18, 2],
        hs=[64, 32, 16, 8],
        ws=[64, 32, 16, 8],
        sharesets_nums=[1, 4, 16, 128],
        reparam_conv_k=[1, 3],
        pretrained=None),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=19),
    auxiliary_head=dict(in_channels=320, num_classes=19),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 683)))

max_iters = 80000
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=max_iters, by_epoch=False)]
