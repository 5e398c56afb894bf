"""RepLKNet-31B (ImageNet-22K), ADE20K at 640 x 640.

Published: mIoU 51.5 single-scale, 52.3 multi-scale; 112M parameters.
5.12 million images: 40,000 iterations on 64 GPUs x 2 images, as published, or MMSegmentation's 160,000
on 8 x 4. With another GPUs x batch, max_iters is 5,120,000 / (GPUs x batch).
"""
_base_ = ['./RepLKNet_upernet.py', 'mmseg::_base_/datasets/ade20k_640x640.py']

model = dict(data_preprocessor=dict(size=(640, 640)),
             test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426)))

train_dataloader = dict(batch_size=2)

# test.py --tta: relative to the test pipeline's scale; MMSegmentation's own is relative to the image
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2560 * ratio), int(640 * ratio)), keep_ratio=True)
    for ratio in _base_.img_ratios]
