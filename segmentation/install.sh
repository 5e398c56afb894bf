#!/bin/sh
# Install MMSegmentation 1.x and MMDetection 3.x into the environment of the Python given: segmentation/install.sh .venv/bin/python
#
# mmcv is compiled, which takes 7 minutes of CPU, once for each pair of Python and torch: the wheel is kept in the user's cache.
set -eu
python=$1
mmcv=2.1.0  # the packages below refuse 2.2
# setuptools < 81 still has the pkg_resources that mmengine imports; ftfy and regex are needed by mmseg, which does not say so
"$python" -m pip install 'setuptools<81' wheel psutil ninja ftfy regex mmengine==0.10.7 mmsegmentation==1.2.2 mmdet==3.3.0
built_for=$("$python" -c 'import sys, torch; print(f"py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}")')
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/replknet/mmcv-$mmcv-$built_for
if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  # torch's headers want C++20, but mmcv's -std=c++17 stands after CXXFLAGS: only a compiler that adds its own last gets through
  printf '#!/bin/sh\nexec %s "$@" -std=c++20 -g0 -O2\n' "${CXX:-g++}" >"$scratch/cxx20"
  chmod +x "$scratch/cxx20"
  CXX=$scratch/cxx20 MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip wheel \
    --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$scratch/wheels" "mmcv==$mmcv"
  mkdir -p "$wheels"
  mv "$scratch"/wheels/*.whl "$wheels"
fi
"$python" -m pip install "$wheels"/*.whl
"$python" -c 'import mmcv.ops, mmdet, mmseg; print("mmcv", mmcv.__version__, "mmseg", mmseg.__version__, "mmdet", mmdet.__version__)'
