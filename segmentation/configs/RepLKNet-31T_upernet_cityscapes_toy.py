"""A toy in Cityscapes' layout, as RepLKNet-31T_upernet_ade20k_toy.py otherwise."""
_base_ = './RepLKNet-31T_upernet_ade20k_toy.py'

model = dict(decode_head=dict(num_classes=19, align_corners=True),
             auxiliary_head=dict(num_classes=19, align_corners=True))

train_dataloader = dict(dataset=dict(
    type='CityscapesDataset', data_root='toy_data/cityscapes',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')))
val_dataloader = dict(dataset=dict(
    type='CityscapesDataset', data_root='toy_data/cityscapes',
    data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val')))
test_dataloader = val_dataloader
