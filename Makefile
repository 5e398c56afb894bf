# make setup            makes .venv; the others do so first
# make demo             trains and evaluates a toy on real images
# make test             runs the tests, but for those of the targets below
# make test-slow        runs the long ones; TESTS='FILE FILE::TEST ...' those among them
# make test-slurm       runs those that train on a SLURM of their own; skipped where Debian's is not installed
# make gpu-report       checks and times one GPU in eight minutes; writes gpu_report.json and gpu_report.md
# make downstream       installs MMSegmentation and MMDetection into .venv; compiles mmcv, once
# make test-downstream  trains, tests and uses toys with them
PYTHON ?= python3

.PHONY: setup demo test test-slow test-slurm gpu-report downstream test-downstream

setup: .venv/installed

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install torch==2.14.1 torchvision==0.29.1
	.venv/bin/pip install --editable '.[dev]'
	touch $@

DIGITS = --model RepLKNet-31T --data_set DIGITS --input_size 32 --num_workers 2 --channels_last

demo: setup
	rm -rf demo_output
	.venv/bin/python main.py $(DIGITS) --epochs 40 --warmup_epochs 3 --batch_size 64 --lr 8e-3 \
		--aa none --reprob 0 --mixup 0 --cutmix 0 --output_dir demo_output
	.venv/bin/python main.py $(DIGITS) --eval true --resume demo_output/latest.pth \
		--with_small_kernel_merged true

test: setup
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

test-slow: setup
	.venv/bin/python -m pytest -m 'slow and not slurm and not downstream' $(TESTS)

test-slurm: setup
	.venv/bin/python -m pytest -m 'slurm and not slow'

gpu-report: setup
	.venv/bin/python tools/benchmark.py gpu

downstream: .venv/downstream

.venv/downstream: .venv/installed segmentation/install.sh
	segmentation/install.sh .venv/bin/python
	touch $@

test-downstream: downstream
	.venv/bin/python -m pytest -m downstream
