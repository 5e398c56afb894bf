#!/bin/sh
# Install MMSegmentation 1.x and MMDetection 3.x for a Python: segmentation/install.sh .venv/bin/python
# And mmpretrain and segmentation_models_pytorch, which take our models from timm.
#
# mmcv is compiled, which takes 7 minutes of CPU, once for each Python, torch, and with or without CUDA: the
# wheel is kept in the user's cache. With a GPU in sight it is compiled for it, which needs the CUDA toolkit
# (nvcc); on a node without one, such as a cluster's login node, FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0 9.0"
# does the same.
set -eu
python=$1
mmcv=2.1.0  # the packages below refuse 2.2
# setuptools < 81 still has the pkg_resources that mmengine imports; mmseg needs ftfy and regex without a word
"$python" -m pip install 'setuptools<81' wheel psutil ninja ftfy regex \
  mmengine==0.10.7 mmsegmentation==1.2.2 mmdet==3.3.0 mmpretrain==1.2.0 segmentation-models-pytorch==0.6.0
if ! "$python" -c 'import cv2' 2>/dev/null; then  # no libGL, as in most containers
  "$python" -m pip uninstall --yes opencv-python
  "$python" -m pip install --force-reinstall --no-deps opencv-python-headless
fi
built_for=$("$python" -c '
import os, sys, torch
cuda = "cuda" if torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1" else "cpu"
print(f"py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}-{cuda}")')
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/replknet/mmcv-$mmcv-$built_for
if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  # torch's headers want C++20, but mmcv's -std=c++17 stands after CXXFLAGS: compilers must add their own last
  printf '#!/bin/sh\nexec %s "$@" -std=c++20 -g0 -O2\n' "${CXX:-g++}" >"$scratch/cxx20"
  nvcc=${PYTORCH_NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
  printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "$nvcc" >"$scratch/nvcc20"
  chmod +x "$scratch/cxx20" "$scratch/nvcc20"
  CXX=$scratch/cxx20 PYTORCH_NVCC=$scratch/nvcc20 MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "$python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$scratch/wheels" \
    "mmcv==$mmcv"
  mkdir -p "$wheels"
  mv "$scratch"/wheels/*.whl "$wheels"
fi
"$python" -m pip install --force-reinstall --no-deps "$wheels"/*.whl
"$python" -c 'import mmcv.ops, mmdet, mmseg
print("mmcv", mmcv.__version__, "mmseg", mmseg.__version__, "mmdet", mmdet.__version__)'
