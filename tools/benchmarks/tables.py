"""The published columns of parameters and FLOPs, computed: on the meta device, so that it takes no memory.

FLOPs are multiply-adds of convolutions and linear layers for one image, each weight once a position, of the
merged model (figures of the authors) or of the trained one. Where a table counts otherwise:

mmpretrain   the trained model, and 5 for each value of a BatchNorm
RepMLPNet    parameters without BatchNorms
UperNet      without the auxiliary head
Cascade      1,000 proposals through the box heads and 100 through the mask heads, as MMDetection 2 counted

Rows with kernels behind the model's name are of a backbone with these and not the config's: nearer to what is
published.
"""
import argparse
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import replknet_zoo
from tools.benchmarks import common

HELP = 'the published parameters and FLOPs of every table, computed'
COLUMNS = {'table': 30, 'model': 24, 'image': 11, 'parameters': 10, 'published_parameters': 20,
           'parameters_percent': 18, 'gflops': 10, 'published_gflops': 16, 'gflops_percent': 14}
ROOT = Path(__file__).resolve().parent.parent.parent
BOX_PROPOSALS, MASK_PROPOSALS = 1000, 100
NORM_FLOPS = 5  # for a value of a BatchNorm, in mmpretrain's counts


class Row(NamedTuple):
    """A row of a published table; parameters in millions, None where none is published."""
    table: str
    model: str
    height: int
    width: int
    parameters: float | None
    gflops: float
    config: str = ''  # of MMSegmentation or MMDetection
    kernels: tuple[int, ...] = ()  # in the place of its backbone's


TABLE_5 = [Row('paper, Table 5, ImageNet', name, 224, 224, parameters, gflops)
           for name, parameters, gflops in (
    ('RepLKNet-3', 71.8, 12.9), ('RepLKNet-7', 72.2, 13.1), ('RepLKNet-13', 73.7, 13.4),
    ('RepLKNet-25', 78.2, 14.8), ('RepLKNet-31B', 79.3, 15.3))]
TABLE_6 = [Row('paper, Table 6, ImageNet', name, size, size, parameters, gflops)
           for name, size, parameters, gflops in (
    ('RepLKNet-31B', 224, 79, 15.3), ('RepLKNet-31B', 384, 79, 45.1), ('RepLKNet-31L', 384, 172, 96.0),
    ('RepLKNet-XL', 320, 335, 128.7))]
MMPRETRAIN = [Row('mmpretrain', name, size, size, parameters, gflops) for name, size, parameters, gflops in (
    ('RepLKNet-31B', 224, 79.86, 15.64), ('RepLKNet-31B', 384, 79.86, 45.95),
    ('RepLKNet-31L', 384, 172.67, 97.24), ('RepLKNet-XL', 320, 335.44, 129.57))]
REPMLPNET = [Row('RepMLPNet', f'RepMLPNet-{name}', size, size, parameters, gflops)
             for name, size, parameters, gflops in (
    ('T224', 224, 38.3, 2.8), ('B224', 224, 68.2, 6.7), ('T256', 256, 58.7, 4.2), ('B256', 256, 96.5, 9.6),
    ('D256', 256, 86.9, 8.6), ('L256', 256, 117.7, 11.5))]
ADE = 'RepLKNet-31B_1Kpretrain_upernet_160k_ade20k_512'
SEGMENTATION = [
    Row('paper, Table 5, ADE20K', 'RepLKNet', 512, 2048, 104.1, 1119, ADE, (3, 3, 3, 3)),
    Row('paper, Table 5, ADE20K', 'RepLKNet-31B', 512, 2048, 111.7, 1170, ADE),
    Row('paper, Table 7, Cityscapes', 'RepLKNet-31B', 1024, 2048, 110, 2315,
        'RepLKNet-31B_1Kpretrain_upernet_80k_cityscapes_769'),
    Row('paper, Table 7, Cityscapes', 'RepLKNet', 1024, 2048, 110, 2315,
        'RepLKNet-31B_1Kpretrain_upernet_80k_cityscapes_769', (25, 25, 25, 13)),
    Row('paper, Table 8, ADE20K', 'RepLKNet-31B', 512, 2048, 112, 1170, ADE),
    Row('paper, Table 8, ADE20K', 'RepLKNet-31B', 640, 2560, 112, 1829,
        'RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640'),
    Row('paper, Table 8, ADE20K', 'RepLKNet-31L', 640, 2560, 207, 2404,
        'RepLKNet-31L_22Kpretrain_upernet_160k_ade20k_640'),
    *(Row('paper, Table 8, ADE20K', 'RepLKNet-XL', 640, 2560, 374, 3431,
          'RepLKNet-XL_MegData73M_upernet_160k_ade20k_640', kernels) for kernels in ((), (31, 29, 27, 13)))]
DETECTION = [
    Row('COCO, FCOS', 'RepLKNet-31B', 800, 1280, 87, 437, 'RepLKNet-31B_1Kpretrain_fcos_2x_coco'),
    *(Row('COCO, Cascade Mask R-CNN', name, 800, 1280, parameters, gflops,
          f'{config}_cascade_mask_rcnn_3x_coco', kernels) for name, parameters, gflops, config, kernels in (
        ('RepLKNet-31B', 137, 965, 'RepLKNet-31B_22Kpretrain', ()),
        ('RepLKNet-31L', 229, 1321, 'RepLKNet-31L_22Kpretrain', ()),
        ('RepLKNet-XL', 392, 1958, 'RepLKNet-XL_MegData73Mpretrain', ()),
        ('RepLKNet-XL', 392, 1958, 'RepLKNet-XL_MegData73Mpretrain', (31, 29, 27, 13))))]


def add_options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def check_options(args: argparse.Namespace) -> None:
    """Nothing to check."""


def run(args: argparse.Namespace) -> None:
    """Print the tables, and write them."""
    content = common.begin(args)
    print('parameters in millions; gflops: multiply-adds / 1e9; percent: computed over published, less 100')
    common.report(content, COLUMNS, groups(), args.json)


def groups() -> Iterator[list[dict]]:
    """The rows of each table; of those downstream where the packages are installed, which is told."""
    yield [line(row, *of_classifier(row)) for row in TABLE_5 + TABLE_6]
    yield [line(row, *as_mmpretrain_counts(row)) for row in MMPRETRAIN]
    yield [line(row, *as_repmlpnet_is_counted(row)) for row in REPMLPNET]
    for package, rows, count in (('mmseg', SEGMENTATION, of_segmentor), ('mmdet', DETECTION, of_detector)):
        if importlib.util.find_spec(package) is None:
            print(f'{package} is not installed: {len(rows)} rows are left out (make downstream)')
        else:
            yield [line(row, *count(row)) for row in rows]


def line(row: Row, parameters: float, gflops: float) -> dict:
    """What is printed of a row, with what was computed."""
    model = f'{row.model} {"-".join(map(str, row.kernels))}'.rstrip()
    return {'table': row.table, 'model': model, 'image': f'{row.height}x{row.width}',
            'parameters': parameters, 'published_parameters': row.parameters,
            'parameters_percent': 100 * (parameters / row.parameters - 1), 'gflops': gflops,
            'published_gflops': row.gflops, 'gflops_percent': 100 * (gflops / row.gflops - 1)}


# ---- Counting ----------------------------------------------------------------------------------------------


def count(run: Callable[[], object]) -> tuple[float, float]:
    """Multiply-adds of convolutions and linear layers in run(), and values of BatchNorms, both / 1e9."""
    products, norms = [], []

    def see(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            # each weight once a position: of the outputs, or of the inputs, which a transposed one spreads
            values = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            products.append(layer.weight.numel() * values.numel() // len(layer.weight))
        elif isinstance(layer, nn.BatchNorm2d):
            norms.append(output.numel())

    with nn.modules.module.register_module_forward_hook(see), torch.inference_mode():
        run()
    return sum(products) / 1e9, sum(norms) / 1e9


def millions(model: nn.Module, left_out: str = '') -> float:
    """Parameters / 1e6 but for those whose names begin with `left_out`."""
    return sum(p.numel() for name, p in model.named_parameters()
               if not (left_out and name.startswith(left_out))) / 1e6


def _classifier(row: Row) -> nn.Module:
    with torch.device('meta'):
        return replknet_zoo.create_model(row.model, use_sync_bn=False, implementation='pytorch').eval()


def _image(row: Row) -> Tensor:
    return torch.empty(1, 3, row.height, row.width, device='meta')


def of_classifier(row: Row) -> tuple[float, float]:
    """Parameters and multiply-adds of the merged model."""
    model = _classifier(row)
    model.structural_reparam()
    return millions(model), count(lambda: model(_image(row)))[0]


def as_mmpretrain_counts(row: Row) -> tuple[float, float]:
    """Of the model as trained, with its BatchNorms."""
    model = _classifier(row)
    products, norms = count(lambda: model(_image(row)))
    return millions(model), products + NORM_FLOPS * norms


def as_repmlpnet_is_counted(row: Row) -> tuple[float, float]:
    """Of the injected model, without its BatchNorms."""
    model = _classifier(row)
    model.structural_reparam()
    products = count(lambda: model(_image(row)))[0]
    norms = sum(p.numel() for module in model.modules() if isinstance(module, nn.BatchNorm2d)
                for p in module.parameters())
    return millions(model) - norms / 1e6, products


# ---- Segmentation and detection ----------------------------------------------------------------------------


def _downstream(row: Row, package: str, folder: str) -> nn.Module:
    """The merged model of a config, on the meta device, with the row's kernels if it has any."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = Config.fromfile(ROOT / folder / 'configs' / f'{row.config}.py')
        importlib.import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
        init_default_scope(package)
        if row.kernels:
            config.model.backbone.update(large_kernel_sizes=list(row.kernels), small_kernel=None)
        with torch.device('meta'):
            model = MODELS.build(config.model).eval()
    model.backbone.structural_reparam()
    return model


def of_segmentor(row: Row) -> tuple[float, float]:
    """Of backbone and UperNet, without the auxiliary head."""
    model = _downstream(row, 'mmseg', 'segmentation')
    gflops = count(lambda: model.decode_head(model.backbone(_image(row))))[0]
    return millions(model, 'auxiliary_head.'), gflops


def of_detector(row: Row) -> tuple[float, float]:
    """Of backbone, neck, and all heads."""
    model = _downstream(row, 'mmdet', 'detection')
    dense = model.bbox_head if hasattr(model, 'bbox_head') else model.rpn_head
    gflops = count(lambda: dense(model.extract_feat(_image(row))))[0]
    if hasattr(model, 'roi_head'):
        for heads, size, proposals in ((model.roi_head.bbox_head, 7, BOX_PROPOSALS),
                                       (model.roi_head.mask_head, 14, MASK_PROPOSALS)):
            regions = torch.empty(proposals, 256, size, size, device='meta')
            gflops += count(lambda heads=heads, x=regions: [head(x) for head in heads])[0]
    return millions(model), gflops
