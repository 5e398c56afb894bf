"""Each option of the recipe has its effect on what a run computes: ignoring one of them fails a test here."""
import math

import pytest
import torch

import main
from conftest import SHORT, log_lines, run_main
from replknet_zoo import create_model

# two steps of plain gradient descent, on images that are not mixed: what they change can be computed
PLAIN = ['--epochs', '1', '--warmup_epochs', '0', '--lr', '0.1', '--min_lr', '0.1', '--opt', 'momentum',
         '--momentum', '0', '--weight_decay', '0', '--mixup', '0', '--cutmix', '0', '--smoothing', '0',
         '--reprob', '0', '--aa', 'none', '--color_jitter', '0', '--disable_eval']


@pytest.fixture
def train(imagenet, tmp_path):
    """train(*options): a run's last checkpoint, its log, and the weights that all runs begin with."""
    torch.manual_seed(0)
    torch.save({'model': create_model('RepLKNet-31T', num_classes=2).state_dict()}, tmp_path / 'begin.pth')

    def run(*options: str) -> dict:
        folder = tmp_path / '_'.join(options).replace('/', '')[:100]
        run_main(*SHORT, '--data_path', imagenet, '--output_dir', folder, '--resume', tmp_path / 'begin.pth',
                 *options)
        return {**torch.load(folder / 'latest.pth', weights_only=True), 'log': log_lines(folder),
                'begin': torch.load(tmp_path / 'begin.pth', weights_only=True)['model']}
    return run


def movement(run: dict) -> float:
    """The length of the way from the first weights to the last, running statistics left out."""
    parameters = dict(create_model('RepLKNet-31T', num_classes=2).named_parameters())
    return math.sqrt(sum((run['model'][name] - run['begin'][name]).double().square().sum().item()
                         for name in parameters))


def test_plain_steps_move_against_the_gradient(train):
    run = train(*PLAIN, '--batch_size', '8')  # one step
    assert movement(run) == pytest.approx(0.1 * run['log'][0]['train_grad_norm'], rel=1e-4)


def test_clip_grad_bounds_the_step(train):
    run = train(*PLAIN, '--batch_size', '8', '--clip_grad', '0.01')
    assert run['log'][0]['train_grad_norm'] > 1  # before clipping
    assert movement(run) == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_update_freq_takes_one_step_of_several_batches(train):
    run = train(*PLAIN, '--update_freq', '2')
    assert movement(run) == pytest.approx(0.1 * run['log'][0]['train_grad_norm'], rel=1e-3)
    steps = [train('--update_freq', freq)['optimizer']['state'][0]['step'] for freq in '12']  # of 16 images
    assert steps == [4, 2]


def test_weight_decay_shrinks_matrices_and_no_vectors(train):
    run = train(*PLAIN, '--clip_grad', '1e-9', '--weight_decay', '0.5', '--opt', 'adamw', '--lr', '1e-3',
                '--min_lr', '1e-3', '--opt_eps', '1e3')
    shrunk = (1 - 1e-3 * 0.5) ** 2  # eps makes Adam's own steps vanish
    assert torch.allclose(run['model']['head.weight'], run['begin']['head.weight'] * shrunk, rtol=1e-5)
    assert torch.allclose(run['model']['norm.weight'], run['begin']['norm.weight'], rtol=1e-6)


def test_the_optimizer_gets_its_betas_epsilon_and_momentum(train):
    group = train('--opt_betas', '0.7', '0.8', '--opt_eps', '1e-3')['optimizer']['param_groups'][0]
    assert (*group['betas'], group['eps']) == (0.7, 0.8, 1e-3)
    group = train('--opt', 'sgd', '--momentum', '0.4')['optimizer']['param_groups'][0]
    assert group['momentum'] == 0.4 and group['nesterov']


def test_learning_rates_follow_warm_up_cosine_and_layers(train):
    def rates(*options):
        run = train('--lr', '0.01', '--min_lr', '0', *options)
        return [(line['train_lr'], line['train_min_lr']) for line in run['log']]
    # four steps: the cosine 1, 0.854, 0.5, 0.146; of a warm-up of one epoch 0 and 1; of one step 0
    cosine = [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]

    def means(*four: float) -> list[tuple[float, float]]:
        return [(0.01 * (four[i] + four[i + 1]) / 2,) * 2 for i in (0, 2)]
    assert rates('--warmup_epochs', '0') == [pytest.approx(pair) for pair in means(*cosine)]
    assert rates('--warmup_epochs', '1') == [pytest.approx(pair) for pair in means(0, 1, 1, 0.5)]
    assert rates('--warmup_steps', '1') == [pytest.approx(pair) for pair in means(0, 1, 0.75, 0.25)]
    for rate, least in rates('--warmup_epochs', '0', '--layer_decay', '0.5'):
        assert least == pytest.approx(rate * 0.5 ** 13)


def test_the_average_moves_by_one_minus_its_decay(train):
    run = train(*PLAIN, '--batch_size', '8', '--model_ema', '--model_ema_decay', '0.75')
    for name in ('head.weight', 'stem.0.conv.weight'):
        expected = 0.75 * run['begin'][name] + 0.25 * run['model'][name]
        assert torch.allclose(run['model_ema'][name], expected, rtol=1e-5, atol=1e-7)


def losses(*options: str) -> tuple[object, float]:
    """The mixup of a command, and its loss of logits 2 and 0 for class 0."""
    args = main.get_args_parser().parse_args(['--nb_classes', '2', *options])
    mixup, criterion = main.build_mixup_and_criterion(args)
    target = torch.tensor([0]) if mixup is None else torch.tensor([[1.0, 0.0]])
    return mixup, criterion(torch.tensor([[2.0, 0.0]]), target).item()


def test_smoothing_mixup_and_cutmix_make_the_targets():
    likely, unlikely = (-math.log(p) for p in torch.tensor([2.0, 0.0]).softmax(0).tolist())
    for smoothing in (0.0, 0.1, 0.4):
        mixup, loss = losses('--mixup', '0', '--cutmix', '0', '--smoothing', str(smoothing))
        assert mixup is None
        assert loss == pytest.approx((1 - smoothing / 2) * likely + smoothing / 2 * unlikely, rel=1e-5)
    mixup, loss = losses('--mixup', '0.3', '--cutmix', '0.7', '--smoothing', '0.2', '--mixup_prob', '0.6',
                         '--mixup_switch_prob', '0.4', '--mixup_mode', 'pair')
    assert loss == pytest.approx(likely, rel=1e-5)  # the targets are soft already
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing, mixup.mix_prob, mixup.switch_prob,
            mixup.mode) == (0.3, 0.7, 0.2, 0.6, 0.4, 'pair')
    mixup, _ = losses('--cutmix_minmax', '0.2', '0.8')
    assert mixup.cutmix_minmax == [0.2, 0.8]


def test_drop_path_and_checkpointing_reach_the_blocks():
    args = main.get_args_parser().parse_args(['--model', 'RepLKNet-31T', '--drop_path', '0.4',
                                              '--use_checkpoint'])
    args.distributed = False
    model = main.build_model(args)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks[::2]]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert model.use_checkpoint and all(stage.use_checkpoint for stage in model.stages)


@pytest.mark.parametrize('options', [
    ['--use_amp', '--epochs', '8'],  # float16 skips the first steps, until its loss scale has come down
    ['--use_amp', '--amp_dtype', 'bfloat16', '--clip_grad', '1'], ['--use_checkpoint', '--drop_path', '0.1'],
    ['--mixup', '0', '--cutmix', '0', '--smoothing', '0', '--batch_size', '3'], ['--dist_eval', 'false'],
    ['--opt', 'lookahead_sgd', '--momentum', '0.5'], ['--cutmix_minmax', '0.2', '0.8']])
def test_recipes_train(options, train):
    run = train('--lr', '0.01', '--warmup_epochs', '0', '--epochs', '4', *options)
    assert 0.01 < movement(run) < 100 and 0 < run['log'][-1]['train_loss'] < 10
    in_float16 = '--use_amp' in options and 'bfloat16' not in options
    assert bool(run['scaler']) == in_float16
