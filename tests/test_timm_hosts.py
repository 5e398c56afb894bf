"""Our models through timm in segmentation_models_pytorch and mmpretrain; `make downstream` installs them."""
import pytest
import torch

pytest.importorskip('segmentation_models_pytorch', reason='run `make downstream` first')
pytest.importorskip('mmpretrain', reason='run `make downstream` first')

import segmentation_models_pytorch as smp
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmpretrain.models import ImageClassifier, TIMMBackbone
from mmpretrain.structures import DataSample
from timm.utils import reparameterize_model
from torch import nn

import replknet_zoo.timm_models  # noqa: F401  registers the models
from conftest import relative_error, with_random_weights

# the packages' own
pytestmark = [pytest.mark.downstream, pytest.mark.filterwarnings('ignore')]
NAMES = ['replknet_31t', 'repmlpnet_t32']


def changed_by_a_step(model: nn.Module, step) -> set[str]:
    before = {key: value.clone() for key, value in model.named_parameters()}
    step()
    return {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('build', [smp.Unet, smp.UPerNet, smp.FPN])
def test_segmentation_models_pytorch_trains_and_merges_an_encoder(name, build):
    torch.manual_seed(0)
    model = build(f'tu-{name}', encoder_weights=None, in_channels=4, classes=3)
    x, targets = torch.randn(2, 4, 64, 64), torch.randint(0, 3, (2, 64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step() -> None:
        nn.functional.cross_entropy(model(x), targets).backward()
        optimizer.step()
    changed = changed_by_a_step(model, step)
    assert {key for key, _ in model.named_parameters() if key.startswith('encoder.')
            and key.endswith('conv.weight')} <= changed
    with_random_weights(model).eval()
    with torch.no_grad():
        assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize('name', NAMES)
def test_mmpretrain_trains_a_classifier_with_the_backbone(name):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = ImageClassifier(
        backbone={'type': 'TIMMBackbone', 'model_name': name}, neck={'type': 'GlobalAveragePooling'},
        head={'type': 'LinearClsHead', 'num_classes': 5, 'in_channels': 128},
        data_preprocessor={'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375]})
    data = {'inputs': torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
            'data_samples': [DataSample().set_gt_label(i) for i in range(4)]}
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    losses = {}
    changed = changed_by_a_step(model, lambda: losses.update(model.train_step(data, wrapper)))
    assert losses['loss'] > 0
    assert {key for key, _ in model.named_parameters() if key.startswith('backbone.')
            and key.endswith('conv.weight')} <= changed
    assert len(model.test_step(data)) == 4


@pytest.mark.parametrize('name', NAMES)
def test_mmpretrains_backbone_gives_the_maps_that_are_asked_for(name):
    backbone = TIMMBackbone(name, features_only=True, out_indices=(1, 3))
    assert [tuple(y.shape) for y in backbone(torch.randn(2, 3, 64, 64))] == [(2, 32, 8, 8), (2, 128, 2, 2)]
