"""The command line of LoRA files: `python -m trainer.export verify FILE`, `convert FILE --to F5 --out OTHER`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.errors import UserError

DONE, USER_ERROR = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done or good, 1 a user's error or a file with faults."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", file=sys.stderr)
    return USER_ERROR


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A user's error like any other; argparse itself would exit with another code."""
        raise UserError(f"{message}; `{self.prog} --help` explains all options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m trainer.export", description="Examine and convert LoRA files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_verify(commands.add_parser("verify", help="what a file is, and which programs read all of it"))
    _add_convert(commands.add_parser("convert", help="write a file in another format of its family"))
    return parser


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a LoRA as a .safetensors file")
    parser.add_argument("--base", metavar="FILE_OR_FOLDER", type=Path,
                        help="the base model that it is for (default: the family's usual sizes)")
    parser.add_argument("--for", dest="consumers", metavar="PROGRAMS", default="",
                        help="programs that must read it, of comfyui,a1111,forge,diffusers (default: all that have "
                        "the kind of model)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from trainer.export import report as reports  # late: it loads torch and diffusers

    named = [name.strip() for name in options.consumers.split(",") if name.strip()]
    report = reports.examine(options.file, base=options.base, consumers=reports.check_consumers(named))
    print(json.dumps(reports.as_json(report), indent=2) if options.json else reports.as_text(report))
    return DONE if report.good else USER_ERROR


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a LoRA as a .safetensors file")
    parser.add_argument("--to", metavar="FORMAT", required=True,
                        help="U1 or U2 (SD 1.5, SDXL), F1, F5 or F6 (Flux); auto: the family's usual")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--dtype", choices=("auto", "fp16", "bf16", "fp32"), default="auto",
                        help="its precision (default: as it is)")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from trainer.export.convert import convert  # late: it loads torch

    written = convert(options.file, options.to, options.out, dtype=options.dtype)
    print(f"{written.path}: format {written.format}, rank {written.rank}, {written.tensors} tensors, "
          f"{written.bytes / 1e6:.1f} MB")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
