"""Set up Stiefel Studio in an own environment beside this file, then open the app or run the tests.

    python launch.py [options of the app]      open the app at http://127.0.0.1:7860
    python launch.py test [options of pytest]  run the whole test suite
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


# Before everything else, and this file in syntax of Python 3.6, so that an old interpreter can say so itself.
def require_python(version: tuple) -> None:
    if tuple(version[:2]) < (3, 11):
        found = ".".join(str(part) for part in version[:3])
        sys.exit(
            f"Stiefel Studio needs Python 3.11 or newer; {sys.executable} is {found}.\n"
            "Install a newer one (python.org has them all), then start it as: python3.12 launch.py"
        )


require_python(sys.version_info)

HERE = Path(__file__).resolve().parent
PYTHON_MINOR = "{}.{}".format(*sys.version_info)
TORCH_WHEELS = "https://download.pytorch.org/whl/"
APP_REQUIREMENTS = ["requirements.txt"]
TEST_REQUIREMENTS = ["requirements.txt", "tests/requirements.txt"]
APP_FOLDERS = ("--workspace", "--root", "--models")
APP_OPTIONS = """options of the app: --port N, --host ADDRESS, --password WORD, --workspace DIR, --listen,
--share, --root DIR (data sets may be opened below it), --models DIR (base models); both may be given several times.
README.md says more.
TORCH_INDEX_URL=address takes torch from another package index; empty, from pip's usual one."""


class Gpu(NamedTuple):
    """One GPU as nvidia-smi tells it; memory in MiB, 0 where the driver does not say."""

    name: str
    driver: int
    capability: float
    memory: int

    def outdated_driver(self) -> bool:
        """No build of torch works with this driver: CUDA 12 wants 525, and Blackwell CUDA 13, thus 580."""
        return self.driver < (580 if self.capability >= 10 else 525)


# What this machine has


def find_nvidia_smi() -> str | None:
    return shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")


def find_gpus(nvidia_smi: str | None) -> list[Gpu]:
    if nvidia_smi is None:
        return []
    query = ["--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run([nvidia_smi, *query], stdout=subprocess.PIPE, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # A failing nvidia-smi explains itself where the table should be
    return [gpu for gpu in map(read_gpu, answer.stdout.splitlines()) if gpu]


def read_gpu(row: str) -> Gpu | None:
    try:
        name, driver, capability, memory = row.rsplit(", ", 3)
        return Gpu(name, int(driver.split(".")[0]), float(capability), int(memory) if memory.isdigit() else 0)
    except ValueError:
        return None


def torch_index(platform: str, gpus: list[Gpu]) -> str:
    """The package index whose torch fits the machine; "" is pip's own, which has macOS, and CUDA 13 on Linux.

    CUDA 13 needs driver 580 and no longer knows GPUs older than Turing (7.5); CUDA 12.6 needs driver 525.
    """
    usable = [gpu for gpu in gpus if gpu.driver >= 525]
    if platform == "darwin":
        return ""
    if not usable:
        return "" if platform == "win32" else TORCH_WHEELS + "cpu"
    if any(gpu.driver < 580 or gpu.capability < 7.5 for gpu in usable):
        return TORCH_WHEELS + "cu126"
    return TORCH_WHEELS + "cu130" if platform == "win32" else ""


def describe(gpus: list[Gpu]) -> str:
    if not gpus:
        return "CPU only: the demo works, real models will be slow or will not fit"
    return "; ".join(
        gpu.name
        + (f", {gpu.memory / 1024:.0f} GB" if gpu.memory else "")
        + (f" (driver {gpu.driver} is too old for it: install 580 or newer)" if gpu.outdated_driver() else "")
        for gpu in gpus
    )


def is_reachable(index: str) -> bool:
    """Asks once, for pip would try for minutes."""
    from urllib.request import Request, urlopen  # slow to import, and a warm start does not need it

    try:
        with urlopen(Request(index.rstrip("/") + "/torch/", method="HEAD"), timeout=5):
            return True
    except (OSError, ValueError):  # no route, no such name, an HTTP error; not an address
        return False


# The environment, and its stamp: what it was made for, and which requirements are in it


def interpreter(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprints(requirements: list[str]) -> dict[str, str]:
    """SHA-256 of each file together with what decides the build of torch.

    nvidia-smi comes with the driver, so its path and time stand for the driver without the second it runs.
    """
    smi = find_nvidia_smi()
    driver = f"{smi} {os.stat(smi).st_mtime_ns}" if smi else "none"
    machine = f"{PYTHON_MINOR}\n{os.environ.get('TORCH_INDEX_URL')}\n{driver}\n".encode()
    return {name: hashlib.sha256(machine + (HERE / name).read_bytes()).hexdigest() for name in requirements}


def read_stamp(venv: Path) -> dict[str, str]:
    try:
        return json.loads((venv / "installed").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, stamp: dict[str, str]) -> None:
    draft = venv / "installed.part"
    draft.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(draft, venv / "installed")


def is_ready(venv: Path, requirements: list[str]) -> bool:
    return interpreter(venv).exists() and fingerprints(requirements).items() <= read_stamp(venv).items()


def make_venv(venv: Path, base: str, needed_gb: int) -> None:
    """A new environment for `base`, in place of an older one of ours; never in place of anything else."""
    if (venv / "installed").exists():
        shutil.rmtree(venv)
    if venv.exists() and any(venv.iterdir()):
        sys.exit(f"{venv} was not made by launch.py. Delete it, or name another folder: --venv DIR")
    venv.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(venv).free / 1e9
    if free_gb < needed_gb:
        sys.exit(
            f"The set-up needs about {needed_gb} GB in {venv.parent}, where {free_gb:.1f} GB are free. "
            "Make room, or name a folder on another disk: --venv DIR"
        )
    write_stamp(venv, {})  # ours, and not yet whole
    print(f"Making an environment in {venv}", flush=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", venv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if made.returncode:
        shutil.rmtree(venv)
        debian = "ensurepip" in made.stdout and Path("/etc/debian_version").exists()
        cure = "Debian and Ubuntu keep a part of Python apart: sudo apt install python3-venv"
        sys.exit("Python could not make an environment.\n" + (cure if debian else made.stdout.strip()))
    write_stamp(venv, {"base": base})


def drop_torn_packages(venv: Path) -> None:
    """pip writes RECORD last: a package without it was cut off by a kill, and must not pass for installed."""
    for description in venv.rglob("*.dist-info"):
        if not (description / "RECORD").exists():
            shutil.rmtree(description)


def pip_install(venv: Path, *arguments: str) -> None:
    bar = "on" if sys.stdout.isatty() else "off"
    calm = ["--disable-pip-version-check", "--no-input", "--progress-bar", bar]
    command = [str(interpreter(venv)), "-m", "pip", "install", *calm, *arguments]
    if subprocess.call(command, env=dict(os.environ, PYTHONUTF8="1")):
        sys.exit("pip did not finish; its last lines above say why. The next start goes on from here.")


def set_up(venv: Path, requirements: list[str]) -> None:
    """Install into `venv` what is not there yet; an interrupted or outdated one is mended."""
    if is_ready(venv, requirements):
        return
    wanted = fingerprints(requirements)
    gpus = find_gpus(find_nvidia_smi())
    index = os.environ.get("TORCH_INDEX_URL", torch_index(sys.platform, gpus))
    base = f"Python {PYTHON_MINOR}, torch from {index or 'the usual index'}"
    if read_stamp(venv).get("base") != base or not interpreter(venv).exists():
        make_venv(venv, base, needed_gb=9 if gpus else 3)
    drop_torn_packages(venv)
    if index and not is_reachable(index):
        print(f"{index} does not answer: taking torch from the usual index, which may not fit this machine.")
        print(f"To try that address again, delete {venv}.")
        index = ""
    # torch alone with the extra index: no other package shall come from there, or wait for it
    print("1/2 torch: the largest download, some minutes", flush=True)
    extra = ["--extra-index-url", index] if index else []
    pip_install(venv, "torch", "--constraint", str(HERE / "requirements.txt"), *extra)
    print("2/2 the other packages", flush=True)
    pip_install(venv, *(part for name in requirements for part in ("--requirement", str(HERE / name))))
    write_stamp(venv, {"base": base, **wanted})
    print(f"Set up. Python {PYTHON_MINOR}; {describe(gpus)}", flush=True)


# The start


def absolute_folders(options: list[str]) -> list[str]:
    """Folders among the app's options as seen from here, since the app runs in this file's folder."""
    result = []
    for option in options:
        name, equals, value = option.partition("=")
        if result and result[-1] in APP_FOLDERS:
            option = os.path.abspath(option)
        elif equals and name in APP_FOLDERS:
            option = name + "=" + os.path.abspath(value)
        result.append(option)
    return result


def run(python: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Become that program; Windows waits for it, since exec leaves the console there and splits paths."""
    os.chdir(HERE)
    environment = {**environment, "PYTHONUTF8": "1"}
    if os.name == "nt":
        sys.exit(subprocess.call([python, *arguments], env=environment))
    os.execve(python, [python, *arguments], environment)


def test_all(python: str, environment: dict[str, str]) -> None:
    """The whole suite: most of it on several cores, then what holds a limit of time, alone."""
    environment = {**environment, "PYTHONUTF8": "1"}
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    parts = [["not gpu and not timed", *workers], ["timed and not gpu"]]
    codes = [subprocess.call([python, "-m", "pytest", "-m", *part], cwd=HERE, env=environment) for part in parts]
    sys.exit(next((code for code in codes if code), 0))


def main(arguments: list[str]) -> None:
    import argparse

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "launch.py", description=__doc__, epilog=APP_OPTIONS, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--venv", type=Path, default=HERE / ".venv", help="where the environment is kept")
    parser.add_argument("--no-setup", action="store_true", help="install nothing, use this interpreter")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    options, rest = parser.parse_known_args(arguments)
    testing = rest[:1] == ["test"]
    python = sys.executable
    if not options.no_setup:
        venv = Path(os.path.abspath(options.venv))
        set_up(venv, TEST_REQUIREMENTS if testing else APP_REQUIREMENTS)
        python = str(interpreter(venv))
    if testing:
        # Several threads on a few busy cores are slower than one
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if rest[1:]:
            run(python, ["-m", "pytest", "-m", "not gpu", *rest[1:]], environment)
        test_all(python, environment)
    browser = [] if options.no_browser or "--open" in rest else ["--open"]
    run(python, ["-m", "app", *absolute_folders(rest), *browser], dict(os.environ))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nStopped. The next start goes on from here.")
