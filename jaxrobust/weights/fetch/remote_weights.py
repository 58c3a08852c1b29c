"""Weight files from the internet, in a cache: any URL, or a repository of a model hub."""

import contextlib
import os
import re
import shlex
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from jaxrobust.runtime.files import caches, download
from jaxrobust.runtime.files.download import Tell, Unreachable, check_sha256, file_sha256
from jaxrobust.weights.store import files

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # names of weight files in a hub repository
SETTINGS = "config.json"  # the file next to them
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?(?:/([\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(
    source: str, *, sha256: str | None = None, name: str | None = None, tell: Tell = print
) -> tuple[Path, Path | None]:
    """Download a file, and any settings next to it, into the cache, unless already there."""
    if source.startswith("hf://"):
        with download.quiet_hub():
            path, settings = _from_hub(source, tell)
        check_sha256(path, sha256)
        return path, settings
    if not source.startswith(("https://", "http://")):
        raise ValueError(f"{source}: give a file, https://..., or hf://ORG/REPO[@REVISION][/FILE]")
    url, _, pinned = source.partition("#sha256=")
    wanted = sha256 or pinned or None
    return download.fetch(url, "weights", sha256=wanted, name=name, tell=tell), None


def parse_hub(source: str) -> tuple[str, str | None, str | None]:
    """Parse `hf://ORG/REPO[@REVISION][/FILE]`; write a slash in a revision (refs/pr/1) as %2F."""
    match = _HUB.fullmatch(source)
    if not match:
        raise ValueError(
            f"{source}: write hf://ORG/REPO[@REVISION][/FILE], such as "
            "hf://timm/convnext_tiny.fb_in1k"
        )
    return match[1], match[2] and urllib.parse.unquote(match[2]), match[3]


def _from_hub(source: str, tell: Tell) -> tuple[Path, Path | None]:
    repository, revision, name = parse_hub(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"{source} needs the hub's client: pip install 'jaxrobust[hub]' (or give the "
            "https:// address of the file)"
        ) from error
    refusals = {  # the first error is a subclass of the last
        errors.GatedRepoError: "its authors ask for your consent first: give it at "
        f"https://huggingface.co/{repository}, log in with `hf auth login` (or set HF_TOKEN), and "
        "run the same command again",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision}",
        errors.RepositoryNotFoundError: f"{repository} does not exist on the hub, or is "
        "private; check its name, or log in with `hf auth login`",
    }
    endpoint = os.environ.get("HF_ENDPOINT") or None
    cache = caches.folder("weights") / "hub"

    def get(file: str) -> Path | None:
        try:
            path = huggingface_hub.hf_hub_download(
                repository, file, revision=revision, cache_dir=cache, endpoint=endpoint
            )
        except errors.LocalEntryNotFoundError as error:  # it did not ask, or got no answer
            cached = huggingface_hub.try_to_load_from_cache(
                repository, file, cache_dir=cache, revision=revision
            )
            if not (cached is None or isinstance(cached, str)):  # it did not exist when last asked
                return None
            reason = f"{error.__cause__ or error}".partition("\n")[0]
            raise Unreachable(
                f"{source}: the hub does not answer ({reason}), and {file} is not in the cache; "
                f"try again, set HF_ENDPOINT to a mirror, or run `{_by_hand(source)}` on a machine "
                "with network access and give DIR"
            ) from error
        except errors.EntryNotFoundError:
            return None
        return _checked(Path(path))

    try:
        tell(f"{repository}: contacting the hub")
        weights = next(
            (path for file in ([name] if name else WEIGHTS) if (path := get(file))), None
        )
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        cause = next((words for kind, words in refusals.items() if isinstance(error, kind)), "")
        raise ValueError(f"{source}: {cause or str(error).partition(chr(10))[0]}") from error
    if weights is None:
        holds = _weights_in(huggingface_hub.HfApi(endpoint=endpoint), repository, revision)
        raise ValueError(
            f"{source}: {repository} holds no {name or ' or '.join(WEIGHTS)}; "
            + (f"name one of its files: {', '.join(holds)}" if holds else "")
            + ("" if holds else "choose a repository with PyTorch weights")
        )
    return weights, get(SETTINGS)


def _by_hand(source: str) -> str:
    repository, revision, name = parse_hub(source)
    words = ["hf", "download", repository, *([name] if name else [WEIGHTS[0], SETTINGS])]
    words += ["--revision", revision] if revision else []
    return shlex.join([*words, "--local-dir", "DIR"])


def _checked(path: Path) -> Path:
    """Check a file in the hub's cache; the real name of a large one is its hash."""
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name) and file_sha256(blob) != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} does not have the hub's sha256 ({blob.name}), so the download was "
            "damaged and has been removed; run the same command again"
        )
    return path


def _weights_in(api: Any, repository: str, revision: str | None) -> list[str]:
    at = f"hf://{repository}" + (f"@{urllib.parse.quote(revision, safe='')}" if revision else "")
    with contextlib.suppress(Exception):  # this only makes an error more helpful
        there = api.list_repo_files(repository, revision=revision)
        return [f"{at}/{file}" for file in there if Path(file).suffix in files.SUFFIXES][:5]
    return [f"{at}/FILE"]
