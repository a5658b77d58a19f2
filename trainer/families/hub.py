"""Models named by hub id: found in huggingface_hub's cache without a network, else planned and downloaded once."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import tqdm

from trainer.errors import UserError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")
_FILES = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin")  # a path with such an end is no hub id
_TEXT_FILES = (".json", ".txt", ".model", ".jinja")
_LOOK = 0.2  # seconds between two looks at a download
_WINDOW = 10.0  # seconds over which its speed is taken


@dataclass(frozen=True)
class Plan:
    """What is to be downloaded of a repository: files that are not here, with their bytes, the small ones first."""

    repo: str
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Progress:
    """How far a download is: bytes done and in all, the file that is coming (from 1) of how many, bytes a second."""

    done: int
    of: int
    file: int
    files: int
    speed: float


def is_hub_id(base: str) -> bool:
    """Whether `base` can only be a hub id, such as "someone/some-model": nothing on the disk has that name."""
    return bool(_ID.fullmatch(base)) and not Path(base).exists() and not base.endswith(_FILES)


def cached(repo: str) -> Path | None:
    """The folder of a model in huggingface_hub's cache, complete or not; None when there is none."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)
        return Path(incomplete) if incomplete else None
    except HFValidationError:
        return None


def cached_tokenizer(repo: str) -> Path | None:
    """The folder in the cache of a repository whose top holds a tokenizer; None when it is not here."""
    folder = cached(repo)
    return folder if folder and any((folder / name).exists() for name in _TOKENIZERS) else None


def plan(repo: str, subfolders: Collection[str]) -> Plan:
    """What has to come of a model's `subfolders`: safetensors, configs and tokenizers that are not here.

    Raises UserError when the model is gated, unknown or out of reach, or has no safetensors.
    """
    wanted = choose(_ask(repo), subfolders)
    names = [file.rfilename for file in wanted]
    if "model_index.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{repo} on the hub has no diffusers folders with .safetensors weights: download the file "
                        "that you want and give its path")
    return _missing(repo, wanted)


def fetch_telling(plan: Plan) -> Path:
    """Download the small files that tell what kind of model this is, and return the folder they are in."""
    try:
        for name, _ in plan.files:
            if name == "unet/config.json":
                hf_hub_download(plan.repo, name)
        return Path(hf_hub_download(plan.repo, "model_index.json")).parent
    except Exception as error:
        raise _explained(plan.repo, error) from None


def plan_tokenizer(repo: str) -> Plan:
    """What has to come of a repository whose top holds a tokenizer: its text files. Raises UserError as `plan`."""
    files = _ask(repo)
    if not any(file.rfilename in _TOKENIZERS for file in files):
        raise UserError(f"{repo} on the hub has no tokenizer at its top: download it and give its folder")
    return _missing(repo, [file for file in files if "/" not in file.rfilename
                           and file.rfilename.endswith(_TEXT_FILES)])


def plan_files(repo: str, pick: Callable[[Sequence[RepoSibling]], list[RepoSibling]]) -> Plan:
    """What has to come of the files of a repository that `pick` chooses. Raises UserError as `plan`."""
    return _missing(repo, pick(_ask(repo)))


def _ask(repo: str) -> Sequence[RepoSibling]:
    try:
        return HfApi().model_info(repo, files_metadata=True).siblings or []
    except Exception as error:
        raise _explained(repo, error) from None


def _missing(repo: str, wanted: Sequence[RepoSibling]) -> Plan:
    """The small files first: a folder with all its weights then has the rest too, wherever it was cut off."""
    files = [(file.rfilename, file.size or 0) for file in wanted
             if not isinstance(try_to_load_from_cache(repo, file.rfilename), str)]
    return Plan(repo, tuple(sorted(files, key=lambda file: file[1])))


def choose(files: Sequence[RepoSibling], subfolders: Collection[str]) -> list[RepoSibling]:
    """The files to download: model_index.json, and of each subfolder the configs and the smaller set of weights."""
    chosen = [file for file in files if file.rfilename == "model_index.json"]
    for folder in subfolders:
        here = [file for file in files if file.rfilename.startswith(f"{folder}/") and file.rfilename.count("/") == 1]
        weights = [file for file in here if file.rfilename.endswith(".safetensors")]
        plain = [file for file in weights if file.rfilename.count(".") == 1]
        half = [file for file in weights if ".fp16" in file.rfilename and ".non_ema" not in file.rfilename]
        chosen += half or plain
        other = [file for file in here if file.rfilename.endswith(_TEXT_FILES)]
        chosen += [file for file in other if ".index." not in file.rfilename
                   or (".fp16" in file.rfilename) == bool(half) and ".safetensors" in file.rfilename]
    return chosen


def check_room(plan: Plan) -> None:
    """Raise UserError when the disk of the cache has too little room for what is to come."""
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if plan.bytes > free:
        raise UserError(f"{plan.repo} needs {plan.bytes / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free: make "
                        "room, or set HF_HOME to another disk")


def fetch(plan: Plan) -> Iterator[Progress]:
    """Download what is planned; yields how far it is some times a second, so that the caller may show it or leave.

    The work is done by a thread that dies with the process; what it has by then is gone on with the next time.
    Raises UserError, as `plan`, for whatever goes wrong on the way.
    """
    work = _Work(plan)
    thread = threading.Thread(target=work.run, daemon=True)
    seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK)
        now, done = time.monotonic(), work.done
        seen.append((now, done))
        while len(seen) > 2 and now - seen[0][0] > _WINDOW:
            seen.popleft()
        speed = (done - seen[0][1]) / max(now - seen[0][0], 1e-6)
        yield Progress(min(done, plan.bytes), plan.bytes, max(work.file, 1), len(plan.files), speed)
    if work.error is not None:
        raise _explained(plan.repo, work.error) from None


class _Work:
    """A download as it goes: bytes of whole files and of the present one, and the fault that ended it."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.file, self.error = plan, 0, None
        self._whole = self._present = 0

    @property
    def done(self) -> int:
        return self._whole + self._present

    def run(self) -> None:
        try:
            for name, size in self.plan.files:
                self.file += 1
                hf_hub_download(self.plan.repo, name, tqdm_class=_meter(self._count))
                self._present, self._whole = 0, self._whole + size
        except Exception as error:  # told by the thread that waits
            self.error = error

    def _count(self, amount: int) -> None:
        self._present += amount


def _meter(count: Callable[[int], None]) -> type[tqdm]:
    """A progress bar for huggingface_hub that draws nothing and counts bytes, those of an earlier try included."""

    class Meter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
            super().__init__(*args, **options | {"disable": True})
            count(int(self.n))

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, before they are written: not counted twice."""

    return Meter


def _explained(repo: str, error: Exception) -> Exception:
    """What the hub or the network refused, in a user's words; a fault of the program as it is."""
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then log in here with "
                         "`hf auth login`, or set HF_TOKEN to a token of yours")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return UserError(f"there is no folder or file {repo} here, and no model of that name on the hub (a private "
                         "one needs `hf auth login`)")
    if isinstance(error, (HTTPError, OSError)):
        return UserError(f"{repo} is not on this machine, and the hub cannot be reached: {_first_sentence(error)}. "
                         "Check the connection, or give the path of a local folder or file")
    return error


def _first_sentence(error: Exception) -> str:
    return first_line(error).split(". ")[0].rstrip(".")
