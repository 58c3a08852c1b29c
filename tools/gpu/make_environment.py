"""`python3.13 tools/gpu/make_environment.py FOLDER`: an environment that compiles for absent GPUs.

It has JAX with its CUDA plug-in, NVIDIA's `ptxas`, what the package needs, and pytest; a GPU, a
driver or CUDA are not needed. With `FOLDER/bin/python`, `tools/bench_step.py --topology h100:1` and
`jaxrobust estimate --on h100:8` compile for GPUs, and JAX interprets their kernels on the CPU.
"""

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JAX = "0.12.0.1"
PACKAGES = (
    *(f"{name}=={JAX}" for name in ("jax", "jax-cuda12-plugin", "jax-cuda12-pjrt")),
    "nvidia-cuda-nvcc-cu12",
    "pytest>=8",
)


def commands(folder: Path) -> list[list[str]]:
    """List the commands that make the environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", *project["dependencies"], *PACKAGES]
    return [[sys.executable, "-m", "venv", str(folder)], install]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="New folder of the environment.")
    args = parser.parse_args()
    if sys.version_info < (3, 12):
        parser.error(f"JAX {JAX} needs Python 3.12 or newer; run this with python3.13")
    for command in commands(args.folder):
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
