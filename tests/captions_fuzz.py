"""Random sequences of caption work, each cut off by kills: `python -m tests.captions_fuzz --sequences 500 --seed 0`.

A sequence is worked through by processes that kill themselves (SIGKILL) at a random file operation, or in the middle
of writing a file.  What the next one finds must be the state after the last whole change or after the one that was
under way, byte for byte; in the end all is undone, and every file must be as it was at first.  Imports the captions,
the journal and the operations, and nothing of the web app.
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.datasets.changes import Change, Move, Write, content
from app.datasets.journal import Journal
from app.datasets.operations import parse
from trainer import captions

Files = dict[str, bytes]
State = tuple[Files, list[tuple[int, bool]]]  # with the journal's entries, and whether each is undone
MEMORY = Path("/dev/shm")  # quicker than a disk that others use, and to a kill it is the same
STEPS = 8  # of a sequence
ODD = [b"\xef\xbb\xbfa cat, red\r\nsecond line\r\n", "Ü, é, tab\t\n\n".encode(), b"", b"red, red, blue ",
       b"one\ntwo\nthree", b"M\xe4dchen"]
BULK: list[dict[str, Any]] = [
    {"kind": "replace", "find": "red", "replace": "green"}, {"kind": "add", "text": "sks"},
    {"kind": "replace", "find": r"(\w+), (\w+)", "replace": r"\2, \1", "mode": "regex"},
    {"kind": "add", "text": "photo", "where": "after", "skip_present": False}, {"kind": "sort_tags"},
    {"kind": "remove_duplicates"}, {"kind": "trigger", "word": "xyz", "old": "sks"},
    {"kind": "rename_tag", "tag": "green", "to": "Ünï"}, {"kind": "separator", "old": ",", "new": "\n"}]


def read_tree(root: Path) -> Files:
    """All files but those of `.studio`."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and ".studio" not in path.parts}


def read_state(journal: Journal) -> State:
    return read_tree(journal.root), [(entry.id, entry in journal._undone) for entry in journal._made + journal._undone]


def act(journal: Journal, step: tuple[str, int]) -> None:
    """One step; which one, and on what, is a function of its seed and of what is on the disk."""
    kind, seed = step
    root, rng = journal.root, random.Random(seed)
    if kind == "undo":
        journal.undo()
    elif kind == "redo":
        journal.redo()
    elif changes := _changes(root, kind, rng):
        journal.do(kind, changes)


def _changes(root: Path, kind: str, rng: random.Random) -> list[Change]:
    names = sorted(read_tree(root))
    texts = [name for name in names if name.endswith(".txt")]
    if kind == "move":
        stems = sorted({name[:-4] for name in names})
        stem, target = rng.choice(stems), f"folder{rng.randrange(3)}/{rng.randrange(10**6)}"
        return [Move(name, target + name[-4:]) for name in names if name[:-4] == stem]
    if kind == "edit":
        name = rng.choice([*texts, f"new{rng.randrange(5)}.txt"])
        before = content(root, name)
        new = rng.choice(["", "a dog", "two\nlines", "ü " * 3000, str(rng.random())])
        return [Write(name, before, captions.encode(new, like=before or b""))]
    edit = parse(rng.choice(BULK)).editor({})
    changes: list[Change] = []
    for name in texts:
        data = content(root, name) or b""
        try:
            text = captions.decode(data, root / name)
        except captions.UserError:
            continue
        if (new := edit(text).text) != text:
            changes.append(Write(name, data, captions.encode(new, like=data)))
    return changes


class Torn(io.FileIO):
    """A file whose writer can be killed when half of it is written."""

    def write(self, data: Any) -> int:
        if _dies_now():
            super().write(bytes(data)[:random.randrange(len(data) + 1)])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)


_LEFT = -1  # file operations until death; below zero there is none


def _dies_now() -> bool:
    global _LEFT
    _LEFT -= 1
    return _LEFT == 0


def arm(operations: int, root: Path) -> None:
    """Die at the so-manieth operation on files below root."""
    global _LEFT
    _LEFT = operations
    opened, fdopened = builtins.open, os.fdopen

    def open_(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        is_ours = mode in ("ab", "wb") and str(root) in str(path)
        return Torn(path, mode.replace("b", "")) if is_ours else opened(path, mode, *rest, **options)

    builtins.open = open_  # type: ignore[assignment]
    os.fdopen = lambda handle, mode, *rest: (  # type: ignore[assignment]
        Torn(handle, mode.replace("b", "")) if mode == "wb" else fdopened(handle, mode, *rest))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "tempfile.mkstemp", "open",
                              "os.truncate")
        if is_change and str(root) in str(arguments[0]) and _dies_now():
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def work(root: Path, steps: list[tuple[str, int]], death: int, seed: int, acknowledge: int) -> None:
    """In a process of its own: the steps, each acknowledged by a byte."""
    random.seed(seed)
    arm(death, root)
    journal = Journal(root)
    for step in steps:
        act(journal, step)
        os.write(acknowledge, b".")


def killed_after(root: Path, steps: list[tuple[str, int]], death: int, seed: int) -> int:
    """Steps that were surely finished before the worker died, or ended."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            done = len(pipe.read())
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), f"the worker ended with {code}"
        return done
    os.close(reading)
    try:
        work(root, steps, death, seed, writing)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def expected(root: Path, steps: list[tuple[str, int]]) -> list[State]:
    """The states of an undisturbed copy of the folder after 0, 1, 2… steps."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy)
        journal = Journal(copy)
        states = [read_state(journal)]
        for step in steps:
            act(journal, step)
            states.append(read_state(journal))
        return states


def run_sequence(seed: int, root: Path) -> int:
    """One sequence; how many kills it took.  Raises `AssertionError` for a byte that is not as it must be."""
    rng = random.Random(seed)
    for i in range(rng.randint(3, 8)):
        (root / f"{i}.png").write_bytes(rng.randbytes(40))
        if rng.random() < 0.8:
            (root / f"{i}.txt").write_bytes(rng.choice(ODD))
    first = read_tree(root)
    images = sorted(data for name, data in first.items() if name.endswith(".png"))
    kinds = rng.choices(["edit", "bulk", "undo", "redo", "move"], [4, 3, 3, 2, 1], k=STEPS)
    steps = [(kind, rng.randrange(10**9)) for kind in kinds]
    kills = 0
    while steps:
        states = expected(root, steps)
        done = killed_after(root, steps, death=rng.randint(1, 120), seed=rng.randrange(10**9))
        kills += done < len(steps)
        now = read_state(Journal(root))  # whoever opens it next finishes what was under way
        reached = [i for i in (done + 1, done) if i < len(states) and states[i] == now]
        assert reached, f"sequence {seed}: after {done} of {steps}: {now} is neither of {states[done:done + 2]}"
        assert sorted(data for name, data in now[0].items() if name.endswith(".png")) == images
        steps = steps[reached[0]:]
    journal = Journal(root)
    while journal.undo():
        pass
    assert read_tree(root) == first, f"sequence {seed}: undoing all does not give the first state back"
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = 0
    tempfile.tempdir = str(MEMORY) if os.access(MEMORY, os.W_OK) else None
    os.fsync = lambda handle: None  # type: ignore[assignment]  # a kill, unlike a power cut, loses nothing written
    for seed in range(options.seed, options.seed + options.sequences):
        with tempfile.TemporaryDirectory() as folder:
            kills += run_sequence(seed, Path(folder))
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "gradio", "transformers", "PIL"})
    print(json.dumps({"sequences": options.sequences, "kills": kills, "loaded": loaded}))


if __name__ == "__main__":
    main()
