"""LoRA files for the app: finds them, says what they are, starts the tools beside the app and follows them."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.jobs import Launch, start_detached
from app.paths import Places, can_be_sent, inside
from trainer.errors import UserError
from trainer.export import formats, header, texts
from trainer.export.recognise import family_of, find_family
from trainer.files import replacing
from trainer.run import Run

TOOLS = (sys.executable, "-m", "trainer.export")
Answer = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
DRAFT = re.compile(r"[a-z0-9_]{8}|\d+\.partial")  # what is half written is called so, behind the name that it will have
LARGEST = 4e9  # bytes; what is larger is a base model
MOST_FILES = 500  # of one folder that are listed
MOST_LOOKED_AT = 50_000
PATIENCE = 5.0  # seconds for a tool to end by itself
WALKED_FOR = 20.0  # seconds for which a listing of the roots holds
BAD_NAME = ("a file's name begins with a letter or digit, and has letters, digits, blanks, '.', '_' and '-', at most "
            "100 of them")
MOST_LAYERS = 12  # of a table
PROGRAMS = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "diffusers": "diffusers"}
OLD_COMFYUI = {"id": "comfyui-old", "label": "ComfyUI before 0.11", "format": "F6"}  # of Flux.2
HAVE = {  # programs that have a family
    "sd15": ("comfyui", "a1111", "forge", "diffusers"), "sdxl": ("comfyui", "a1111", "forge", "diffusers"),
    "flux1": ("comfyui", "forge", "diffusers"), "flux2": ("comfyui", "diffusers"),
}


@dataclass
class Task:
    """A tool at work: its process, and the file that it writes, if any."""

    launch: Launch
    out: Path | None
    cancelled: bool = False


class Exporting:
    """The LoRA files that this app may read, and the tools at work on them.

    An id of a file is a place ("run", "made", or a root's number), ":", and the path below it.
    """

    def __init__(self, places: Places, tools: tuple[str, ...] = TOOLS) -> None:
        self.places = places
        self._tools = tools
        self._tasks: dict[str, Task] = {}
        self._first = int(time.time())  # a page that outlives the app must not come upon another one's task
        self._walked: tuple[float, list[Answer]] = (-WALKED_FOR, [])
        self._lock = threading.Lock()

    def sources(self) -> Answer:
        """Files of runs, by run and the newest first; those made here; those below the roots."""
        found = [{"run": run.name, "files": files} for run in self.places.list_runs()
                 if (files := [_row(f"run:{run.name}/{path.relative_to(run.path).as_posix()}", path, _when(run, path))
                               for path in _files_of(run)])]
        made = sorted(filter(_is_listed, self.places.exports.glob("*.safetensors")),
                      key=lambda path: -path.stat().st_mtime)
        with self._lock:
            if time.monotonic() - self._walked[0] > WALKED_FOR:
                others = [_row(f"{number}:{path.relative_to(root).as_posix()}", path, path.relative_to(root).as_posix())
                          for number, root in enumerate(self.places.roots) for path in _walk(root)]
                self._walked = time.monotonic(), others
        return {"runs": found, "made": [_row(f"made:{path.name}", path, path.name) for path in made],
                "others": self._walked[1]}

    def path(self, id: str) -> Path:
        """The file of an id. Raises `UserError` when it is not one that this app may read."""
        place, colon, name = id.partition(":")
        roots: dict[str, Path] = {"run": self.places.runs, "made": self.places.exports,
                                  **{str(number): root for number, root in enumerate(self.places.roots)}}
        if not colon or place not in roots:
            raise UserError(f"there is no LoRA file {id[:100]!r} below the folders that this app may read")
        path = inside(roots[place], name)
        if path.suffix != ".safetensors" or not path.is_file():
            raise UserError(f"there is no LoRA file {name[:100]} any more")
        return path

    def look(self, id: str) -> Answer:
        """What a file is and says of itself, and what it can be made into."""
        path = self.path(id)
        described = header.read(path)
        grouped: dict[str, dict[str, str]] = {}
        for tensor in described.tensors:
            if parts := formats.split(tensor):
                grouped.setdefault(parts[0], {})[parts[1]] = tensor
        family, style = find_family(described, grouped, "")
        form = formats.recognise(described.tensors, family, style)
        ranks = sorted({described.tensors[parts["down"]].shape[0] for parts in grouped.values() if "down" in parts
                        and described.tensors[parts["down"]].shape})
        said = described.metadata
        return {
            "id": id, "name": path.name, "stem": self.free_name(path.stem), "bytes": path.stat().st_size,
            "family": family, "family_name": formats.FAMILIES[family], "format": form.name, "ranks": ranks,
            "layers": len(grouped), "title": said.get("modelspec.title", ""),
            "author": said.get("modelspec.author", ""), "triggers": texts.triggers(said), "targets": targets(family),
            "formats": list(formats.WRITTEN[family]),
            "covers": self._covers(id),
        }

    def free_name(self, stem: str) -> str:
        """A name without ending that no file made here has."""
        stem = re.sub(r"[^A-Za-z0-9 ._-]", "-", stem).lstrip(" ._-")[:80] or "lora"
        taken = {path.stem for path in self.places.exports.glob("*.safetensors")}
        return next(name for number in range(1, len(taken) + 2)
                    if (name := stem if number == 1 else f"{stem}-{number}") not in taken)

    def add(self, name: str, path: Path) -> str:
        """Take an uploaded LoRA in, under a free name; its id. Raises `UserError` for any other file."""
        if not name.endswith(".safetensors"):
            raise UserError(f"{name[:100]!r} is no .safetensors file")
        try:
            family_of(header.read(path))
        except UserError as error:
            raise UserError(str(error).replace(str(path), name[:100])) from None
        self.places.exports.mkdir(parents=True, exist_ok=True)
        target = self.places.exports / f"{self.free_name(Path(name).stem)}.safetensors"
        with replacing(target) as file, path.open("rb") as source:  # a full disk leaves nothing half-written
            shutil.copyfileobj(source, file)
        path.unlink()
        return f"made:{target.name}"

    def cover(self, id: str, name: str) -> Path:
        """A run's picture that shall be the cover of one of its files."""
        if name not in {cover["name"] for cover in self._covers(id)}:
            raise UserError(f"there is no sample {name[:100]!r} of this run any more")
        return self._run_of(id).samples / name

    def _run_of(self, id: str) -> Run:
        return self.places.run(id.partition(":")[2].partition("/")[0])

    def _covers(self, id: str) -> list[dict[str, str]]:
        """The run's newest picture of each prompt."""
        if not id.startswith("run:"):
            return []
        run = self._run_of(id)
        self.places.hand_out(run)
        newest: dict[str, Path] = {}
        for path in sorted(run.samples.glob("*_??.png")):
            newest[path.stem.rpartition("_")[2]] = path
        return [{"name": path.name, "path": path.as_posix()} for path in newest.values()]

    def out(self, name: str) -> Path:
        """Where a new file of that name goes. Raises `UserError` for one that is impossible or taken."""
        name = name.strip().removesuffix(".safetensors")
        if not NAME.fullmatch(name):
            raise UserError(BAD_NAME)
        path = inside(self.places.exports, f"{name}.safetensors")
        if path.exists() or self._is_being_written(path):
            raise UserError(f"there is already a file called {name}; choose another name")
        return path

    def model_out(self, name: str, *, folder: bool) -> Path:
        """Where a new base model of that name goes, a file or a folder. Raises `UserError` as `out` does."""
        name = name.strip().removesuffix(".safetensors")
        if not NAME.fullmatch(name):
            raise UserError(BAD_NAME)
        file, whole = (inside(self.places.models, name + ending) for ending in (".safetensors", ""))
        if file.exists() or whole.exists() or self._is_being_written(file) or self._is_being_written(whole):
            raise UserError(f"there is already a base model called {name}; choose another name")
        return whole if folder else file

    def _is_being_written(self, path: Path) -> bool:
        """Whether a tool, perhaps of another tab, will give a file that name."""
        return any(task.out == path and task.launch.is_running for task in list(self._tasks.values()))

    def start(self, arguments: Sequence[str], out: Path | None = None) -> str:
        """Run a tool as `python -m trainer.export` does; the name of its task."""
        with self._lock:
            if out is not None and self._is_being_written(out):  # asked for by two tabs in the same moment
                raise UserError(f"{out.name} is being written already; choose another name")
            number = str(self._first + len(self._tasks))
            for folder in (self.places.exports, self.places.models):
                folder.mkdir(parents=True, exist_ok=True)
            command = [*self._tools, *arguments, *(["--out", str(out)] if out else []), "--json"]
            launch = start_detached(command, self.places.logs / f"export-{number}-{os.getpid()}.log")
            self._tasks[number] = Task(launch, out)
        return number

    def cancel(self, name: str) -> None:
        """End a tool at work; what it has half written is taken away."""
        task = self._task(name)
        if not task.launch.is_running:
            return
        task.cancelled = True
        task.launch.process.terminate()
        try:
            task.launch.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            task.launch.process.kill()
            task.launch.process.wait()
        if task.out is not None and not task.out.exists():
            for draft in task.out.parent.glob(f".{glob.escape(task.out.name[:60])}.*"):
                if DRAFT.fullmatch(draft.name[len(task.out.name[:60]) + 2 :]):  # not one of a name that goes on so
                    shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)

    def _task(self, name: str) -> Task:
        task = self._tasks.get(name)
        if task is None:
            raise UserError("the app was started again meanwhile; look at the files made here, or start it again")
        return task

    def progress(self, name: str) -> Answer:
        """How far a task is; at its end what came of it, or what was wrong."""
        task = self._task(name)
        is_running = task.launch.is_running  # before its log: of one that has ended, that is whole
        lines = task.launch.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [found for line in lines if line.startswith("{") and isinstance(found := _parsed(line), dict)]
        if is_running:
            last = next((one for one in reversed(said) if "of" in one and "done" in one), {})
            return {"word": "working", "done": last.get("done", 0), "of": last.get("of", 0)}
        results = [one for one in said if "done" not in one]
        if task.cancelled and not (results and task.out is not None and task.out.exists()):
            return {"word": "failed", "text": "Cancelled. Nothing was written."}
        if not results:
            plain = [line for line in lines if line.strip() and not line.startswith("{")]
            return {"word": "failed", "text": plain[-1] if plain else task.launch.last_words()}
        return {"word": "done", "result": self._result(results[-1], task.out)}

    def _result(self, result: Mapping[str, Any], out: Path | None) -> Answer:
        """A tool's answer as the page shows it."""
        if "words" in result and "layers" in result and "report" not in result and "asked" not in result:
            layers = sorted(result["layers"], key=lambda layer: -layer["shared"] * layer["norms"][0])
            return {"comparison": {"words": result["words"], "layers": layers[:MOST_LAYERS], "names": result["names"]}}
        if "changed" in result and out is not None:
            self.places.hand_out_exports()
            return {"model": {"file": out.name, "path": out.as_posix(), "folder": out.is_dir(),
                              "bytes": result["bytes"], "changed": result["changed"],
                              "left_out": len(result["left_out"])}}
        report = result.get("report", result)
        answer: Answer = {"report": shortened(report), "family": report["family"]}
        if out is not None:
            self.places.hand_out_exports()
            answer |= {"file": out.name, "path": out.as_posix(), "bytes": result["bytes"], "format": result["format"],
                       "rank": result["rank"], "dtype": report["dtype"]}
        if result.get("cuts"):
            cuts = sorted(result["cuts"], key=lambda cut: -cut["lost"])
            answer |= {"kept": result["kept"], "cuts": [[cut["layer"], cut["before"], cut["after"], cut["kept"]]
                                                        for cut in cuts[:MOST_LAYERS]]}
        if others := result.get("others"):
            answer["others"] = [len(others), others[0]]
        return answer


def targets(family: str) -> list[dict[str, str]]:
    """Programs that have a family, and the format for each."""
    usual = formats.WRITTEN[family][0]
    found = [{"id": id, "label": PROGRAMS[id], "format": usual} for id in HAVE[family]]
    return found + ([OLD_COMFYUI] if family == "flux2" else [])


def shortened(report: Mapping[str, Any]) -> Answer:
    """A report of `verify` as ticks with words."""
    count = len(report["layers"])
    ticks = [{"id": id, "program": PROGRAMS[id], "good": reading["whole"],
              "words": [f"{fault['text']} ({len(fault['keys'])} layers)" for fault in reading["faults"]]
              or [f"reads all {count} layers at full strength"]} for id, reading in report["asked"].items()]
    return {"ticks": ticks, "faults": report["faults"], "notes": report["notes"]}


def _files_of(run: Run) -> list[Path]:
    """A run's LoRA files: the result, then those of earlier steps, the newest first."""
    others = sorted(run.exports.glob("*.safetensors"), reverse=True)
    return [path for path in (run.result, *others) if _is_listed(path)]


def _when(run: Run, path: Path) -> str:
    if path == run.result:
        return "the result"
    step = path.stem.rpartition("-")[2]
    return f"step {int(step)}" if step.isdecimal() else path.stem


def _walk(root: Path) -> Iterator[Path]:
    """LoRA files below a folder by name, hidden ones and base models left out; not beyond some thousands of files."""
    looked_at = found = 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        looked_at += len(names)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".safetensors") and not name.startswith(".") and not path.is_symlink() and (
                    _is_listed(path) and path.stat().st_size < LARGEST):
                found += 1
                yield path
        if looked_at > MOST_LOOKED_AT or found > MOST_FILES:
            return


def _is_listed(path: Path) -> bool:
    """Whether it is a file, and no link to nowhere, whose name can be sent to the page."""
    return can_be_sent(path.as_posix()) and path.is_file()


def _row(id: str, path: Path, label: str) -> Answer:
    return {"id": id, "label": label, "bytes": path.stat().st_size}


def _parsed(line: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(line)
    except ValueError:
        return None
