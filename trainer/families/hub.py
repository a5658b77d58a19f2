"""Models named by hub id: from huggingface_hub's cache when they are there, else downloaded once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from trainer.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")
_TEXT_FILES = (".json", ".txt", ".model", ".jinja")


def is_hub_id(base: str) -> bool:
    """Whether `base` can only be a hub id, such as "someone/some-model": nothing on the disk has that name."""
    return bool(_ID.fullmatch(base)) and not Path(base).exists() and not base.endswith(".safetensors")


def cached(repo: str) -> Path | None:
    """The folder of a model in huggingface_hub's cache, complete or not; None when there is none."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)
        return Path(incomplete) if incomplete else None
    except HFValidationError:
        return None


def download(repo: str, subfolders: Collection[str]) -> Path:
    """Download the safetensors, configs and tokenizers of a model's `subfolders` into huggingface_hub's cache.

    huggingface_hub shows the progress. Raises UserError when the model is gated, unknown or out of reach, when it
    has no safetensors, or when the disk has too little room.
    """

    def pick(files: Sequence[RepoSibling]) -> list[RepoSibling]:
        wanted = choose(files, subfolders)
        if not any(file.rfilename.endswith(".safetensors") for file in wanted):
            raise UserError(
                f"{repo} on the hub has no diffusers folders with .safetensors weights: download the "
                f"file that you want and give its path"
            )
        return wanted

    return _fetch(repo, pick)


def tokenizer(repo: str) -> Path:
    """The folder of a repository whose top holds a tokenizer: from the cache, else its text files are downloaded."""
    folder = cached(repo)
    if folder and any((folder / name).exists() for name in _TOKENIZERS):
        return folder

    def pick(files: Sequence[RepoSibling]) -> list[RepoSibling]:
        if not any(file.rfilename in _TOKENIZERS for file in files):
            raise UserError(f"{repo} on the hub has no tokenizer at its top: download it and give its folder")
        return [file for file in files if "/" not in file.rfilename and file.rfilename.endswith(_TEXT_FILES)]

    return _fetch(repo, pick)


def _fetch(repo: str, pick: Callable[[Sequence[RepoSibling]], list[RepoSibling]]) -> Path:
    try:
        wanted = pick(HfApi().model_info(repo, files_metadata=True).siblings or [])
        _check_room(repo, wanted)
        return Path(snapshot_download(repo, allow_patterns=[file.rfilename for file in wanted]))
    except GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then log in here with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"there is no folder or file {repo} here, and no model of that name on the hub (a private "
            f"one needs `hf auth login`)"
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{repo} is not on this machine, and the hub cannot be reached: {_first_sentence(error)}. Check "
            f"the connection, or give the path of a local folder or file"
        ) from None


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def choose(files: Sequence[RepoSibling], subfolders: Collection[str]) -> list[RepoSibling]:
    """The files to download: model_index.json, and of each subfolder the configs and the smaller set of weights."""
    chosen = [file for file in files if file.rfilename == "model_index.json"]
    for folder in subfolders:
        here = [file for file in files if file.rfilename.startswith(f"{folder}/") and file.rfilename.count("/") == 1]
        weights = [file for file in here if file.rfilename.endswith(".safetensors")]
        plain = [file for file in weights if file.rfilename.count(".") == 1]
        half = [file for file in weights if ".fp16" in file.rfilename and ".non_ema" not in file.rfilename]
        chosen += half or plain
        chosen += [file for file in here if file.rfilename.endswith(_TEXT_FILES)]
    return chosen


def _check_room(repo: str, files: Sequence[RepoSibling]) -> None:
    needed = sum(file.size or 0 for file in files)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{repo} needs {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free: make room, "
            f"or set HF_HOME to another disk"
        )
    print(f"Downloading {repo}: {needed / 1e9:.1f} GB to {constants.HF_HUB_CACHE}", flush=True)
