"""Runs of two processes that are not of one run, or of which one fails: both end, with the same line."""
import contextlib
import http.server
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import checkpoints
import datasets
import main
import utils
from conftest import SHORT, free_port, run_main, write_images
from forks import fork


def run_cases(cases: str) -> None:
    """In a process of two: run each case with its own options, and print how it ended."""
    rank = int(os.environ['RANK'])
    build = main.build_mixup_and_criterion

    def with_a_bad_gradient(args):
        mixup, criterion = build(args)
        calls = []

        def loss(output, targets):
            calls.append(None)
            value = criterion(output, targets)
            if len(calls) == 4 and rank == 1:
                value.register_hook(lambda gradient: gradient * math.nan)
            return value
        return mixup, loss

    def run(options: list[str]) -> str:
        try:
            main.main(main.get_args_parser().parse_args(options))
            return 'trained'
        except utils.UserError as error:
            return str(error)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    for name, options in json.loads(cases)[rank].items():
        main.build_mixup_and_criterion = with_a_bad_gradient if name == 'gradient' else build
        print('RESULT', json.dumps([name, run(options)]), flush=True)


def run_two(cases: dict[str, tuple[list, list]], folder: Path) -> dict[str, list[str]]:
    """How main.main ended in either process: 'trained', or its error. cases: options of process 0 and of
    process 1."""
    both = []
    for rank in range(2):
        both.append({name: [*map(str, options[rank]), '--dist_url', f'file://{folder}/meet-{i}']
                     for i, (name, options) in enumerate(cases.items())})
    runs = [fork('test_processes:run_cases', json.dumps(both), printed=folder / f'printed{rank}',
                 RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), TORCH_HOME=str(folder / 'torch'))
            for rank in range(2)]
    for run in runs:
        run.wait(300)
    printed = [(folder / f'printed{rank}').read_text() for rank in range(2)]
    results = [dict(json.loads(line.removeprefix('RESULT ')) for line in text.splitlines()
                    if line.startswith('RESULT ')) for text in printed]
    assert all('Traceback' not in text for text in printed) and results[0].keys() == cases.keys(), printed
    return {name: [results[0][name], results[1].get(name)] for name in cases}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the files in `folder`, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_request(self, *arguments):
            asked.append(self.path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}', asked
        server.shutdown()


def copy_of(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


@pytest.fixture(scope='module')
def ended(tmp_path_factory) -> dict[str, list[str]]:
    """Of each case, how both processes ended; 'folders' leads to what they left."""
    folder = tmp_path_factory.mktemp('processes')
    data, fewer, renamed = (folder / name for name in ('data', 'fewer', 'renamed'))
    for part in ('train', 'val'):
        write_images(data / part, 2, 8)
    shutil.copytree(data, fewer)
    (fewer / 'train' / 'class0' / '0.png').unlink()
    shutil.copytree(data, renamed)
    for part in ('train', 'val'):
        (renamed / part / 'class1').rename(renamed / part / 'class2')
    as_many = copy_of(data, 'as_many')
    (as_many / 'train' / 'class0' / '0.png').rename(as_many / 'train' / 'class0' / '00.png')
    options = [*SHORT, '--data_path', data, '--batch_size', '2']
    run_main(*options, '--batch_size', '4', '--epochs', '1', '--output_dir', folder / 'one')
    one, other, whole, cut = folder / 'one', *(copy_of(folder / 'one', name)
                                               for name in ('other', 'whole', 'cut'))
    checkpoint = torch.load(one / 'latest.pth', weights_only=True)
    torch.save({**checkpoint, 'epoch': -1, 'step': 1}, other / 'latest.pth')
    for folder_of_one in (other, cut):
        (folder_of_one / 'checkpoint-0.pth').unlink()
    (cut / 'latest.pth').write_bytes(b'')
    resumable = [*options, '--epochs', '1']

    def apart(option: str, first: object, second: object) -> tuple[list, list]:
        return [*options, option, first], [*options, option, second]
    with served(one) as (address, asked):
        cases = {
            'lr': apart('--lr', 1e-3, 2e-3), 'opt': apart('--opt', 'adamw', 'sgd'),
            'batch': apart('--batch_size', 2, 4),
            'images': apart('--data_path', data, fewer), 'as many': apart('--data_path', data, as_many),
            'classes': apart('--data_path', data, renamed),
            'missing': apart('--data_path', data, folder / 'nowhere'),
            'workers and paths': ([*options, '--output_dir', folder / 'a', '--pin_mem', 'false'],
                                  [*options, '--output_dir', folder / 'b', '--data_path',
                                   copy_of(data, 'mirror')]),
            'checkpoints': tuple([*resumable, '--output_dir', path] for path in (one, other)),
            'no checkpoint': tuple([*resumable, '--output_dir', path] for path in (one, folder / 'empty')),
            'unreadable': tuple([*resumable, '--output_dir', path] for path in (whole, cut)),
            'url': ([*options, '--finetune', f'{address}/latest.pth'],) * 2,
            'wrong url': ([*options, '--finetune', f'{address}/nowhere.pth'],) * 2,
            'gradient': ([*options, '--output_dir', folder / 'c', '--save_ckpt_steps', 1],) * 2,
        }
        return {**run_two(cases, folder), 'folders': folder, 'asked': asked}


@pytest.mark.parametrize('case, message', [
    ('lr', r'the processes are not of one run: lr is 0\.001 on process 0, but 0\.002 on process 1'),
    ('opt', 'opt is adamw on process 0, but sgd on process 1'),
    ('batch', 'batch_size is 2 on process 0, but 4 on process 1'),
    ('images', 'the number of training images is 16 on process 0, but 15 on process 1'),
    ('as many', r'the digest of the list of training images is \w+ on process 0, but \w+ on process 1'),
    ('classes', r'the list of training classes is class0 \.\.\. class1 \(2, .* but class0 \.\.\. class2'),
    ('missing', r'there is no folder .*nowhere.*\(on process 1 of 2\)'),
    ('checkpoints', 'the checkpoint is epoch 1, step 0, digest .* on process 0, but epoch 0, step 1, '),
    ('no checkpoint', r'none of the 3 checkpoints in .* can be resumed from'),
    ('wrong url', r'nowhere\.pth cannot be downloaded \(HTTP Error 404: File not found\)'),
    ('gradient', r'the gradient is not finite: NaN or infinity in stem\.0\.conv\.weight, .* and \d+ more of '
                 r'\d+ parameters at '
                 r'epoch 0, step 3 .*checkpoints are as they were'),
])
def test_processes_that_are_not_of_one_run_end_with_the_same_line(case, message, ended):
    first, second = ended[case]
    assert re.search(message, first), first
    assert re.search(message, second), second


def test_paths_and_workers_may_differ(ended):
    assert ended['workers and paths'] == ['trained', 'trained']


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(ended):
    assert ended['unreadable'] == ['trained', 'trained']  # to its end, from checkpoint-best.pth
    one, whole = ((ended['folders'] / name / 'latest.pth').read_bytes() for name in ('one', 'whole'))
    assert one == whole  # else it began anew


def test_one_process_of_a_node_downloads(ended):
    assert ended['url'] == ['trained', 'trained']
    assert sorted(ended['asked']) == ['/latest.pth', '/nowhere.pth']


def test_a_bad_gradient_of_one_process_spoils_no_checkpoint(ended):
    checkpoint = torch.load(ended['folders'] / 'c' / 'latest.pth', weights_only=True)
    assert (checkpoint['epoch'], checkpoint['step']) == (-1, 3)  # the steps before
    assert checkpoints.non_finite(checkpoint) == ''


def take_turns() -> None:
    """In a process of two: note what a work does that one of each node is to do first, slowly."""
    main.distributed.init_distributed(main.get_args_parser().parse_args(['--device', 'cpu']))
    rank, file = utils.get_rank(), Path(os.environ['LIST'])

    def work() -> str:
        if rank == 0:
            time.sleep(1)  # so the other would be first
            file.write_text('a long list')
        return file.read_text()
    print('RESULT', datasets.one_of_each_node_first(work), flush=True)

    def fail() -> None:
        print('RESULT', f'called on {rank}', flush=True)
        raise utils.UserError('no room')
    try:
        datasets.one_of_each_node_first(fail)
    except utils.UserError as error:
        print('RESULT', error, flush=True)
    main.distributed.end_distributed()


def test_one_process_of_a_node_scans_while_the_others_wait(tmp_path):
    port = str(free_port())
    runs = [fork('test_processes:take_turns', printed=tmp_path / f'printed{rank}', RANK=str(rank),
                 WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
                 LIST=str(tmp_path / 'list')) for rank in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    told = [[line for line in (tmp_path / f'printed{rank}').read_text().splitlines() if 'RESULT' in line]
            for rank in range(2)]
    assert told == [['RESULT a long list', 'RESULT called on 0', 'RESULT no room'],
                    ['RESULT a long list', 'RESULT no room']]
