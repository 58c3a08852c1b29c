"""Uploads a network to the hub, as `jaxrobust export --layout hub` writes it."""

import re
import tempfile
from pathlib import Path
from typing import Any


def push_to_hub(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload of a robust network by jaxrobust",
    license: str | None = None,
    certificate: bool = True,
) -> str:
    """Write a network as a repository of the model hub, upload it, and return its address.

    It is what `jaxrobust export --layout hub` writes: weights, timm's config, the card with the
    accuracies of their records, or the module next to it where timm has no such network.

    Args:
      source: the workdir of a run, or what else `jaxrobust.load` takes.
      repository: `ORG/REPO`, which is made if it is not there.
      private: of a new repository.
      token: of the hub; default: that of `hf auth login`, or $HF_TOKEN.
      revision: branch; default: the main one.
      message: of the commit.
      license: of the weights, for the card; default: what is known of them.
      certificate: compare the file with its reference network before, which needs PyTorch.
    Raises:
      ValueError: no such weights, no name of a repository, or weights that do not agree.
      ImportError: Hugging Face's client is missing.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII):
        raise ValueError(f"{repository!r} is not a repository of the hub; write ORG/REPO")
    try:
        import huggingface_hub
    except ImportError as error:
        message = "push_to_hub needs Hugging Face's client: pip install 'jaxrobust[hub]'"
        raise ImportError(message, name="huggingface_hub") from error
    from jaxrobust.publish import export_torch
    from jaxrobust.weights.fetch import sources

    named = sources.parse(str(source))
    of: dict[str, Any] = {"weights": str(source)}
    if named.kind == "run":
        of = {"workdir": named.path}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / repository.partition("/")[2]
        how: dict[str, Any] = {"license": license, "nocertificate": not certificate}
        export_torch.export(export_torch.ExportSettings(layout="hub", out=out, **of, **how))
        hub = huggingface_hub.HfApi(token=token)
        hub.create_repo(repository, private=private, exist_ok=True)
        about: dict[str, Any] = {
            "repo_id": repository,
            "revision": revision,
            "commit_message": message,
        }
        made = hub.upload_folder(folder_path=str(out), **about)
    return str(getattr(made, "repo_url", None) or f"hf://{repository}")
