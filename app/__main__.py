"""`python -m app`: options, password, and the web server."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_PASSWORD = 12  # the login has no lock-out, so a short one could be tried out


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m app", description="Stiefel Studio: train LoRAs in the browser.")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free one")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; default: this machine only")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"),
                        help="where runs, presets and data sets are kept; default: workspace")
    parser.add_argument("--root", type=Path, action="append", default=[], metavar="DIR",
                        help="a folder below which data sets may be opened; may be given several times")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR",
                        help="a folder with base models, such as ComfyUI's, beside the usual ones; may be given "
                             "several times")
    parser.add_argument("--open", action="store_true", help="open a browser window")
    parser.add_argument("--listen", action="store_true", help="be reachable from other machines (needs a password)")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio (needs a password)")
    parser.add_argument("--password", help=f"at least {SHORTEST_PASSWORD} characters; made up and printed when needed")
    return parser.parse_args(arguments)


def password_for(chosen: argparse.Namespace) -> str | None:
    """The password that this start needs or was given; None for a private one without."""
    if chosen.password is not None and len(chosen.password) < SHORTEST_PASSWORD:
        sys.exit(f"--password: give at least {SHORTEST_PASSWORD} characters, or leave it out and one is made up")
    if chosen.password:
        return chosen.password
    is_private = chosen.host in LOOPBACK and not chosen.listen and not chosen.share
    return None if is_private else secrets.token_urlsafe(16)


def roots_of(chosen: argparse.Namespace) -> tuple[Path, ...]:
    """The folders of --root; one that is not there is told at once."""
    return _folders("--root", chosen.root, "data sets")


def models_of(chosen: argparse.Namespace) -> tuple[Path, ...]:
    """The folders of --models; one that is not there is told at once."""
    return _folders("--models", chosen.models, "base models")


def _folders(option: str, given: list[Path], holds: str) -> tuple[Path, ...]:
    folders = tuple(dict.fromkeys(folder.expanduser().resolve() for folder in given))
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"{option}: {folder} is not a folder; give one that holds {holds}")
    return folders


def serve(chosen: argparse.Namespace) -> None:
    workspace = chosen.workspace.expanduser().resolve()
    password = password_for(chosen)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # trainers number the GPUs as the driver's table does
    os.environ["GRADIO_TEMP_DIR"] = str(workspace / "cache" / "gradio")
    from app import ui  # Gradio reads its settings when it is imported
    from app.jobs import Jobs
    from app.paths import Places
    from trainer.detached import HOME

    places = Places(workspace, roots_of(chosen), models_of(chosen), (HOME.parent, Path.home()))
    workspace.mkdir(parents=True, exist_ok=True)
    host = "0.0.0.0" if chosen.listen and chosen.host in LOOPBACK else chosen.host
    try:
        jobs = Jobs(places)
        jobs.serve_queue()  # the machine may have been restarted
        page, local, public = ui.launch(jobs, host=host, port=chosen.port, password=password,
                                        share=chosen.share, open_browser=chosen.open)
    except OSError as error:
        sys.exit(f"The app could not start: {error}")
    announce(local, public, password, ui.USER, wanted_public=chosen.share)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("\nThe app is closed. Trainings go on; start it again to see them.")
        page.close(verbose=False)


def announce(local: str, public: str | None, password: str | None, user: str, wanted_public: bool) -> None:
    print(f"Stiefel Studio: {local}")
    if public:
        print(f"Public link: {public}")
    elif wanted_public:
        port = local.rstrip("/").rpartition(":")[2]
        print("No public link could be made (it needs the internet). From another machine, use ssh instead:\n"
              f"  ssh -L {port}:127.0.0.1:{port} this-machine")
    if password:
        print(f"User: {user}   Password: {password}\n"
              "Whoever has it can read and write files as you, through this program.")
    print("Ctrl-C closes the app; trainings go on without it.", flush=True)


if __name__ == "__main__":
    serve(options(sys.argv[1:]))
