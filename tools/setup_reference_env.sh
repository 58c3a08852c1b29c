#!/usr/bin/env bash
# Installs what the tests and tools compare with (the extra `parity`, and robustbench) into the
# active Python environment. It brings setuptools below 81: robustbench needs pkg_resources.
set -euo pipefail
python -m pip install 'setuptools<81' torch==2.13.0 torchvision==0.28.0 timm==1.0.9 \
  pyautoattack==0.2.0 geotorch torchdiffeq gdown requests pandas tqdm pyyaml
# Without its requirements, which pin an old gdown; all that it needs stands above.
python -m pip install --no-deps robustbench==1.1.1
