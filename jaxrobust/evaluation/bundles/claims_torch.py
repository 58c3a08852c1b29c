"""Check a bundle: `python verify.py --images X.npy --labels Y.npy --module net.py:load`.

A bundle lists which of N clean images a network misclassifies, and holds adversarial images of
others. Given the images and the network, forward passes on all of them confirm the clean accuracy.
They also confirm that the robust accuracy on the N images is at most what the record in bundle.json
says. They cannot confirm that nothing else fools the network: robust accuracy may be lower.
`jaxrobust verify` attacks some of the images that survive.

A bundle of common corruptions lists the corruptions under which the network classifies each of N
images correctly. Pass as --images a folder in the layout of CIFAR-10-C, with its labels.npy. All
answers are checked, which confirms the accuracies and not only a bound.

This program is part of every bundle. It needs only Python 3.10, NumPy and PyTorch.
The bundle has no images: pass your own, prepared as for the evaluation (bundle.json says how);
their hashes are compared. SHA256SUMS lists the hashes of all files (`sha256sum -c`); its own hash
is the bundle's number.

Labels are a claim too: pass the data set's with --labels labels.npy. Without them nothing is
confirmed, unless --trust-labels accepts the bundle's own labels. Whoever gave you the bundle may
have changed this program: compare it with the one written by the same version of jaxrobust.

Exit codes: 0 everything is confirmed; 1 something is not; 2 a mistake, with one sentence on stderr.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation.bundles.claims import Bundle, Logits, read
from jaxrobust.evaluation.bundles.contradictions import CLEAN
from jaxrobust.evaluation.bundles.findings import Images, judge, lines

BATCH = 50
SEVERITIES = 5  # per kind of corruption, one after the other in its file


def network(name: str, device: str | None) -> Logits:
    """Wrap a PyTorch network as a function of arrays.

    `name`: FILE.py:NAME or package.module:NAME; NAME is a torch.nn.Module from f32[B,C,H,W] in
    [0, 1] to logits, or a function without arguments that returns one.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    file, colon, attribute = name.rpartition(":")
    if not (file and colon and attribute):
        raise ValueError(f"--module {name} is not of the form FILE.py:NAME, such as net.py:load")
    net = getattr(_module(file), attribute, None)
    if callable(net) and not isinstance(net, torch.nn.Module):
        net = net()
    if not isinstance(net, torch.nn.Module):
        raise ValueError(
            f"--module {name} is not a torch.nn.Module; name one, or a function without arguments "
            "that returns one"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    net = net.to(device).float().eval()

    def logits(images: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        moved = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        with torch.no_grad():
            return net(moved).float().cpu().numpy()

    return logits


def _module(file: str) -> Any:
    try:
        if not file.endswith(".py"):
            return importlib.import_module(file)
        path = Path(file).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        sys.path.insert(0, str(path.parent))  # the module may import its neighbors
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"--module {file}: {error}") from error
    return module


def stored_images(path: Path, shape: Sequence[int]) -> tuple[Images, int]:
    """Open a .npy of uint8[N,H,W,C] or f32[N,H,W,C] in [0, 1], which may be larger than memory.

    Image k has id k. Return a function from ids to images, and the number of images.
    """
    stored = _array(path, "images")
    if stored.shape[1:] != tuple(shape) or stored.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"--images {path} is {stored.dtype}{stored.shape}; the bundle needs uint8 or float32 "
            f"[N, {', '.join(map(str, shape))}], channels last"
        )

    def images(_: str, ids: Sequence[int]) -> np.ndarray:
        chosen = stored[list(ids)]
        if chosen.dtype == np.uint8:
            return np.divide(chosen, np.float32(255), dtype=np.float32)
        return chosen

    return images, len(stored)


def stored_corruptions(
    folder: Path, names: Sequence[str], shape: Sequence[int]
) -> tuple[Images, int, np.ndarray]:
    """Open a folder of corrupted images; return them by corruption and id, with N and labels.

    As in CIFAR-10-C, it holds labels.npy and KIND.npy, uint8[5*N,H,W,3], the N images of severity 1
    first. If the bundle has clean images, it also holds clean.npy, uint8[N,H,W,3].
    """
    if not folder.is_dir():
        raise ValueError(
            f"--images {folder} is not a folder; a bundle of common corruptions needs a folder "
            "with KIND.npy for each corruption and labels.npy, as in CIFAR-10-C"
        )
    stored, count = {}, 0
    for name in names:
        kind, _, severity = name.partition("-")
        file, levels = folder / f"{kind}.npy", 1 if name == CLEAN else SEVERITIES
        images = _array(file, "images")
        if images.shape[1:] != tuple(shape) or images.dtype != np.uint8 or len(images) % levels:
            raise ValueError(
                f"--images: {file} is {images.dtype}{images.shape}; the bundle needs uint8 "
                f"[{levels} times N, {', '.join(map(str, shape))}], channels last"
            )
        number = len(images) // levels
        if count and number != count:
            raise ValueError(f"--images: {file} has {number} images of each severity, not {count}")
        count = number
        stored[name] = images[(int(severity or 1) - 1) * count :][:count]
    labels = _array(folder / "labels.npy", "images")
    if labels.shape not in ((count,), (count * SEVERITIES,)) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"--images: {folder / 'labels.npy'} is {labels.dtype}{labels.shape}, but there are "
            f"{count} images of each severity"
        )

    def images_of(name: str, ids: Sequence[int]) -> np.ndarray:
        return np.divide(stored[name][list(ids)], np.float32(255), dtype=np.float32)

    return images_of, count, labels[:count]


def _array(path: Path, flag: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {path} cannot be read as a .npy file ({error})") from error


def main(argv: list[str] | None = None) -> int:
    """Check the bundle in this file's folder, and print the findings; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag(
        "--images",
        type=Path,
        required=True,
        help="The clean images, .npy: uint8[N,H,W,C]; for common corruptions, their folder.",
    )
    flag("--module", required=True, help="The network: FILE.py:NAME or package.module:NAME.")
    flag("--labels", type=Path, help="Labels of the data set, .npy: int[N].")
    flag("--trust-labels", action="store_true", help="Accept the bundle's labels without a check.")
    flag("--bundle", type=Path, default=Path(__file__).parent, help="Default: this folder.")
    flag("--batch", type=int, default=BATCH, help="Batch size.")
    flag("--device", help="Device, such as cpu or cuda; default: cuda if available.")
    args = parser.parse_args(argv)
    try:
        bundle = read(args.bundle)
        images, count, labels = _opened(bundle, args)
        logits = network(args.module, args.device)
        findings = judge(
            bundle,
            images,
            logits,
            count=count,
            labels=labels,
            batch=max(args.batch, 1),
            trust_labels=args.trust_labels,
            tell=lambda line: print(line, file=sys.stderr),
        )
    except ValueError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(bundle, findings)))
    print("This program cannot tell whether these are the record's weights; compare the files.")
    if not bundle.corrupted:
        print("Surviving images were not attacked here; jaxrobust verify attacks some of them.")
    if findings.labels == "unchecked":
        print("Pass --labels to check the labels, or --trust-labels to accept the bundle's.")
    return 0 if findings.whole else 1


def _opened(bundle: Bundle, args: argparse.Namespace) -> tuple[Images, int, np.ndarray | None]:
    """Open the images of a bundle; return them, their number and their labels."""
    about = bundle.about
    if bundle.corrupted:
        if args.labels is not None:
            raise ValueError(
                "--labels has no effect on common corruptions, whose folder has labels; omit it"
            )
        return stored_corruptions(args.images, about["corruptions"], about["image"])
    images, count = stored_images(args.images, about["image"])
    labels = None if args.labels is None else _array(args.labels, "labels")
    if labels is not None and labels.shape != (count,):
        raise ValueError(f"--labels has shape {labels.shape}, but there are {count} images")
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"--labels has type {labels.dtype}, but labels must be integers")
    return images, count, labels


if __name__ == "__main__":
    sys.exit(main())
