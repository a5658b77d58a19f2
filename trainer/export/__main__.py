"""The command line of LoRA files: `python -m trainer.export verify FILE`, and the tools of the workshop."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.__main__ import Parser
from trainer.errors import UserError
from trainer.quantize import quiet_bitsandbytes

if TYPE_CHECKING:
    from trainer.export.resize import Resized
    from trainer.export.writer import Written

DONE, USER_ERROR = 0, 1
WORST = 12  # layers of the table of losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done or good, 1 a user's error or a file with faults."""
    quiet_bitsandbytes()
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing half-written was left behind", file=sys.stderr)
    return USER_ERROR


def end_as_by_keyboard() -> None:
    """A kill and a closed terminal take away what is half written, as Ctrl+C does: it may be as large as a model."""
    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, interrupt)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m trainer.export", description="Examine, convert, change and combine LoRA files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add, name, words in (
            (_add_inspect, "inspect", "what a file says of itself: kind, layers, metadata"),
            (_add_verify, "verify", "what a file is, and which programs read all of it"),
            (_add_convert, "convert", "write a file in another format of its family, or with other metadata"),
            (_add_resize, "resize", "write a file at another rank, with what is lost"),
            (_add_merge, "merge", "merge several LoRAs into one, with weights"),
            (_add_bake, "bake", "put LoRAs into a base model for good"),
            (_add_extract, "extract", "make a LoRA of the difference between two base models"),
            (_add_compare, "compare", "how much two LoRAs overlap, and what they make together")):
        command = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        add(command)
        command.add_argument("--json", action="store_true", help="the result as JSON, the progress as lines of JSON")
    return parser


# Looking


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from trainer.export import describe  # late, as all below: it loads torch

    about = describe.describe(options.file)
    plain = about | {"alphas": [alpha if math.isfinite(alpha) else None for alpha in about["alphas"]]}
    print(json.dumps(plain) if options.json else describe.as_text(about))
    return DONE


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    parser.add_argument("--base", metavar="FILE_OR_FOLDER", type=Path,
                        help="the base model that it is for (default: the family's usual sizes)")
    parser.add_argument("--for", dest="consumers", metavar="PROGRAMS", default="",
                        help="programs that must read it, of comfyui,a1111,forge,diffusers (default: all that have "
                        "the kind of model)")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from trainer.export import report as reports

    named = [name.strip() for name in options.consumers.split(",") if name.strip()]
    report = reports.examine(options.file, base=options.base, consumers=reports.check_consumers(named))
    print(json.dumps(reports.as_json(report)) if options.json else reports.as_text(report))
    return DONE if report.good else USER_ERROR


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=Path, nargs=2, help="two LoRAs of one family, in any formats")
    _add_weights(parser)
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from trainer.export import compare

    found = compare.compare(options.files, options.weights, tell=_progress(options))
    if options.json:
        print(json.dumps(compare.as_json(found)))
        return DONE
    print("\n".join(compare.as_words(found)))
    print("\n  overlap: into   out of   (chance)   first's share   cosine   norms            layer")
    for layer in sorted(found.layers, key=lambda layer: -layer.shared * layer.norms[0])[:WORST]:
        norms = "  ".join(f"{norm:8.4g}" for norm in layer.norms)
        print(f"      {layer.into:8.1%} {layer.out_of:8.1%}   {layer.chance:8.1%} {layer.shared:15.1%} "
              f"{layer.cosine:8.2f}   {norms}   {layer.layer}")
    return DONE


# Writing


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    parser.add_argument("--to", metavar="FORMAT", required=True,
                        help="U1 or U2 (SD 1.5, SDXL), F1, F5 or F6 (Flux); auto: the family's usual")
    _add_out(parser)
    _add_keep_paths(parser)
    parser.add_argument("--title", default="", help="title in the metadata (default: as it is)")
    parser.add_argument("--author", default="", help="author in the metadata (default: as it is)")
    parser.add_argument("--triggers", default="", metavar="WORDS", help="trigger words in the metadata, parted by "
                        "commas")
    parser.add_argument("--cover", type=Path, metavar="PICTURE", help="put this picture into the file, small, as its "
                        "cover")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from trainer.export.convert import convert
    from trainer.export.texts import Labels

    triggers = tuple(word.strip() for word in options.triggers.split(",") if word.strip())
    labels = Labels(options.title, options.author, triggers, options.cover)
    return _say(options, convert(options.file, options.to, options.out, dtype=options.dtype, labels=labels,
                                 keep_paths=options.keep_paths))


def _add_resize(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    rank = parser.add_mutually_exclusive_group(required=True)
    rank.add_argument("--rank", type=int, metavar="R", help="every layer's largest rank")
    rank.add_argument("--energy", type=float, metavar="SHARE",
                      help="the smallest rank for all layers that keeps this share of the file's change (its squared "
                      "norm), such as 0.98")
    rank.add_argument("--dynamic", type=float, metavar="SHARE",
                      help="each layer's own smallest rank that keeps this share of its change; the smallest file, but "
                      "diffusers before 0.40 misreads such files")
    _add_out(parser)
    _add_keep_paths(parser)
    parser.set_defaults(run=_resize)


def _resize(options: argparse.Namespace) -> int:
    from trainer.export.resize import resize

    done = resize(options.file, options.out, rank=options.rank, energy=options.energy, dynamic=options.dynamic,
                  dtype=options.dtype, keep_paths=options.keep_paths, tell=_progress(options))
    return _say(options, done.written, done)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="LoRAs of one family, in any formats")
    _add_weights(parser)
    parser.add_argument("--rank", type=int, metavar="R", help="each layer's nearest change of this rank (default: "
                        "exactly the sum, at the sum of the ranks)")
    _add_out(parser)
    _add_keep_paths(parser)
    parser.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> int:
    from trainer.export.merge import merge

    done = merge(options.files, options.weights, options.out, rank=options.rank, dtype=options.dtype,
                 keep_paths=options.keep_paths, tell=_progress(options))
    return _say(options, done.written, done)


def _add_bake(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="a base model: a single file, or a diffusers folder")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="LoRAs for it")
    _add_weights(parser)
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="the file or folder to write")
    parser.set_defaults(run=_bake)


def _bake(options: argparse.Namespace) -> int:
    from trainer.export.bake import bake

    done = bake(options.base, options.files, options.weights, options.out, tell=_progress(options))
    if options.json:
        print(json.dumps({"path": str(done.path), "bytes": done.bytes, "changed": done.changed,
                          "left_out": done.left_out}))
        return DONE
    print(f"{done.path}: {done.changed} tensors changed, {done.bytes / 1e9:.2f} GB")
    if done.left_out:
        print(f"left out: {len(done.left_out)} layers of text encoders that this base does not hold, such as "
              f"{done.left_out[0]}")
    return DONE


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="the model before: a single file or a diffusers folder")
    parser.add_argument("tuned", metavar="TUNED", type=Path, help="the model after, in any layout of the same family")
    parser.add_argument("--rank", type=int, metavar="R", required=True, help="each layer's largest rank")
    parser.add_argument("--energy", type=float, metavar="SHARE", default=1.0,
                        help="fewer where this share of a layer's change (its squared norm) needs no more")
    parser.add_argument("--exact", action="store_true", help="no randomised decomposition of large layers: slower, by "
                        "minutes a layer for the largest")
    parser.add_argument("--to", metavar="FORMAT", default="auto", help="the format (default: the family's usual)")
    _add_out(parser)
    parser.set_defaults(run=_extract)


def _extract(options: argparse.Namespace) -> int:
    from trainer.export.extract import extract

    done = extract(options.base, options.tuned, options.out, rank=options.rank, energy=options.energy,
                   exact=options.exact, to=options.to, dtype=options.dtype, tell=_progress(options))
    if done.others and not options.json:
        print(f"not in it: {len(done.others)} other tensors that differ too, such as {done.others[0]}; no LoRA holds "
              "norms, biases and embeddings")
    return _say(options, done.written, done)


# What commands share


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a LoRA as a .safetensors file")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=float, nargs="+", default=[], metavar="W",
                        help="how strongly each file counts, in their order (default: 1 each)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--dtype", choices=("auto", "fp16", "bf16", "fp32"), default="auto",
                        help="its precision (default: as it is; of extract the family's usual)")


def _add_keep_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-paths", action="store_true", help="keep the folders of your computer in the metadata "
                        "(default: of each path only its last part)")


def _progress(options: argparse.Namespace) -> Callable[[int, int], None]:
    """How far a tool is: lines of JSON for a program, one line that changes for a person, nothing into a file."""
    def tell(done: int, of: int) -> None:
        if options.json:
            print(json.dumps({"done": done, "of": of}), file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            print(f"\r{done} of {of} layers", end="\n" if done == of else "", file=sys.stderr, flush=True)
    return tell


def _say(options: argparse.Namespace, written: Written, resized: Resized | None = None) -> int:
    """What was written, what was lost, and who reads it."""
    from trainer.export import report as reports

    report = reports.examine(written.path)
    if options.json:
        result: dict[str, Any] = {"path": str(written.path), "format": written.format, "rank": written.rank,
                                  "tensors": written.tensors, "bytes": written.bytes, "report": reports.as_json(report)}
        if resized:
            result |= {"kept": resized.kept, "cuts": [vars(cut) | {"kept": cut.kept} for cut in resized.cuts],
                       "others": getattr(resized, "others", [])}
        print(json.dumps(result))
        return DONE
    print(f"{written.path}: format {written.format}, rank {written.rank}, {written.tensors} tensors, "
          f"{written.bytes / 1e6:.1f} MB")
    if resized and resized.cuts:
        print(_losses(resized))
    for told in (*report.faults, *report.notes):
        print(told)
    for reading in report.asked:
        for fault in reading.faults:
            print(f"{reports.CONSUMERS[reading.consumer]} {fault.text}")
    return DONE


def _losses(resized: Resized) -> str:
    """The layers that lose most, and all together."""
    lines = ["  kept      rank          layer"]
    worst = sorted(resized.cuts, key=lambda cut: -cut.lost)[:WORST]
    lines += [f"  {cut.kept:7.2%}   {cut.before:4} → {cut.after:<4}   {cut.layer}" for cut in worst]
    error = max(0.0, 1 - resized.kept) ** 0.5
    lines.append(f"in all {resized.kept:.2%} of the change's squared norm is kept: a relative error of {error:.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    end_as_by_keyboard()
    sys.exit(main())
