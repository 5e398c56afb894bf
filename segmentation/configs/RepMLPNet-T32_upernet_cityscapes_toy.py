"""A toy of RepMLPNet in Cityscapes' layout, as RepLKNet-31T_upernet_cityscapes_toy.py otherwise.

Crops of 64 x 64 are two by two parts of its FCs. Whole images of 85 x 64 are tested, padded to 96 x 64.
"""
_base_ = './RepLKNet-31T_upernet_cityscapes_toy.py'
custom_imports = dict(imports=['segmentation.repmlpnet'], allow_failed_imports=False)

model = dict(backbone=dict(
    _delete_=True,
    type='RepMLPNet',
    channels=[16, 32, 64, 128],
    num_blocks=[1, 1, 2, 1],
    hs=[8, 4, 2, 1],
    ws=[8, 4, 2, 1],
    sharesets_nums=[1, 4, 16, 32],
    reparam_conv_k=[1, 3],
    pretrained=None))
