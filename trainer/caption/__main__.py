"""`python -m trainer.caption --folder F --model M` proposes captions; `--write` puts them beside the images."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from trainer import captions, cores
from trainer.__main__ import BUG, DONE, USER_ERROR, Parser
from trainer.caption.task import Settings, Suggestion, Task, create, parse
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.quantize import quiet_bitsandbytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done or stopped, 1 a user's error, 2 a bug."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores.choose_waiting(os.environ)
    quiet_bitsandbytes()
    task = None
    try:
        options = _parser().parse_args(arguments)
        task = _task(options)
        workspace = task.path.parent.parent
        from trainer.caption import work  # late: torch takes seconds, and a faulty setting none

        word = work.run(task, workspace)
        _hand_over(task, options, word)
        return DONE
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"{error.filename or 'the task'} cannot be written: {error.strerror}; make room, or choose another "
              "--workspace", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return DONE
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}. This is a fault of the program", file=sys.stderr)
        return BUG


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m trainer.caption", description="Let a model write captions.")
    parser.add_argument("--task", type=Path, metavar="DIR", help="a task that is already written down, as the app does")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="where captioning/ is kept")
    parser.add_argument("--out", type=Path, metavar="PLAN.json", help="write what is proposed to this file")
    parser.add_argument("--write", action="store_true", help="write the captions beside the images")
    for key, field in Settings.model_fields.items():
        takes_list = get_origin(field.annotation) is list
        described = field.description + (" Give several, parted by blanks." if takes_list else "")
        option: dict[str, Any] = {"help": described.replace("%", "%%"), "default": PydanticUndefined, "dest": key}
        if field.annotation is bool:
            option["action"] = "store_true"
        elif takes_list:
            option["nargs"] = "*"
        else:
            option["metavar"] = "|".join(get_args(field.annotation)) if _is_choice(field.annotation) else key.upper()
        parser.add_argument("--" + key.replace("_", "-"), **option)
    return parser


def _is_choice(annotation: Any) -> bool:  # noqa: ANN401
    return get_origin(annotation) is Literal and not isinstance(annotation, UnionType)


def _task(options: argparse.Namespace) -> Task:
    given = {key: value for key in Settings.model_fields if (value := getattr(options, key)) is not PydanticUndefined}
    if options.task is None:
        settings = parse(given)
        return create(options.workspace.resolve(), settings)
    if given:
        raise UserError(f"--task has its own settings; leave out {', '.join('--' + key for key in given)}")
    task = Task(options.task.resolve())
    task.settings()
    return task


def _hand_over(task: Task, options: argparse.Namespace, word: str) -> None:
    """Say, write down or carry out what is proposed."""
    proposed = task.suggestions()
    if options.out:
        plan = [{"image": item.image, "before": item.before, "after": item.after} for item in proposed]
        write_atomic(options.out, json.dumps(plan, ensure_ascii=False, indent=2).encode())
    written = _write(Path(task.settings().folder), proposed) if options.write else 0
    for item in proposed if not (options.out or options.write) else ():
        print(f"{item.image}\n  - {item.before}\n  + {item.after}")
    for entry in task.skipped():
        print(f"skipped {entry['file']}: {entry['reason']}", file=sys.stderr)
    print(f"{word}: {len(proposed)} captions proposed"
          + (f", {written} written" if options.write else "; --write puts them beside the images"), file=sys.stderr)


def _write(folder: Path, proposed: Sequence[Suggestion]) -> int:
    """Captions that are still as the model was shown them are replaced; returns how many."""
    written = 0
    for item in proposed:
        file = captions.sidecar(folder / item.image)
        if captions.read(file) != item.before:
            print(f"skipped {item.image}: its caption was changed meanwhile", file=sys.stderr)
            continue
        written += captions.write(file, item.after)
    return written


if __name__ == "__main__":
    sys.exit(main())
