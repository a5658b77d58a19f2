"""The one gate from names that a browser sends to paths on the disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer import run
from trainer.errors import UserError

LONGEST = 1000  # letters of a name


@dataclass(frozen=True)
class Places:
    """Where the app may look: its workspace, the folders of `--root`, and what the web server hands out."""

    workspace: Path
    roots: tuple[Path, ...] = ()  # below these, and in the workspace, data sets may lie
    model_folders: tuple[Path, ...] = ()  # of --models: base models are looked for in them
    around: tuple[Path, ...] = ()  # where other programs are looked for, which have base models
    handed_out: list[str] = field(default_factory=list)  # the very list that the web server asks for each file

    @property
    def runs(self) -> Path:
        return self.workspace / "runs"

    @property
    def presets(self) -> Path:
        return self.workspace / "presets"

    @property
    def drafts(self) -> Path:
        """Presets that were started without being saved: the trainer takes a file."""
        return self.workspace / "cache" / "drafts"

    @property
    def datasets(self) -> Path:
        return self.workspace / "datasets"

    @property
    def exports(self) -> Path:
        """LoRA files that were made by the tools of the tab "Export"."""
        return self.workspace / "exports"

    @property
    def models(self) -> Path:
        """Base models that LoRAs were put into by the tools of the tab "Export"."""
        return self.workspace / "models"

    @property
    def thumbnails(self) -> Path:
        return self.workspace / "thumbnails"

    @property
    def facts(self) -> Path:
        """What is known of the images of data sets, so that it need not be found again."""
        return self.workspace / "cache" / "facts"

    @property
    def logs(self) -> Path:
        """What trainers say before they have a run folder."""
        return self.workspace / "logs"

    def run(self, name: str) -> run.Run:
        """The run of that name; `UserError` when there is none."""
        try:
            run.check_name(name)
            return run.open_run(inside(self.runs, name))
        except UserError:
            raise UserError(f"there is no run called {name[:100]!r} in {self.runs}") from None

    def list_runs(self) -> list[run.Run]:
        """All runs that a page can be told of, the newest first."""
        return [found for found in run.list_runs(self.workspace) if can_be_sent(found.name)]

    def hand_out(self, of: run.Run) -> None:
        """Let the web server send a run's pictures and results, and nothing else of the run."""
        for path in (of.samples, of.exports, of.result):
            self._hand_out(path)

    def hand_out_exports(self) -> None:
        """Let the web server send the LoRA files and base models made here."""
        for path in (self.exports, self.models):
            self._hand_out(path)

    def hand_out_pictures(self, folder: Path) -> None:
        """Let the web server send the pictures of a try-out."""
        self._hand_out(folder)

    def hand_out_thumbnails(self) -> None:
        """Let the web server send small pictures of data sets; never the data sets themselves."""
        self.thumbnails.mkdir(parents=True, exist_ok=True)
        self._hand_out(self.thumbnails)

    def _hand_out(self, path: Path) -> None:
        """A link is passed over: what it leads to is not the app's to give."""
        with suppress(UserError):
            if str(path) not in self.handed_out and inside(path.parent, path.name) == path.parent.resolve() / path.name:
                self.handed_out.append(str(path))


def can_be_sent(name: str) -> bool:
    """Whether a name found on the disk is text: it may be any bytes there, and no answer can hold those."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def inside(root: Path, name: str) -> Path:
    """`root/name` when that really lies in `root`: no `..`, no absolute path, no link that leads out.

    The file need not exist.  Raises `UserError` otherwise.
    """
    relative = PurePosixPath(name)
    is_plain = 0 < len(name) <= LONGEST and not set(name) & set("\0\\:")
    if not is_plain or relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{name[:100]!r} is not a name inside {root}")
    try:
        base = root.resolve()
        path = (base / relative).resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise UserError(f"{name[:100]!r} cannot be read inside {root}") from None
    if base not in path.parents:
        raise UserError(f"{name[:100]!r} leads out of {root}")
    return path
