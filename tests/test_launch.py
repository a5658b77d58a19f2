"""launch.py, run as a person runs it: in a copy of its files, with small programs in place of pip and GPUs.

`python -m venv` is a module that lays down a recording interpreter, so that the order of all that is started
can be read from one file.
"""

import ast
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import launch

ROOT = Path(launch.__file__).parent
CPU, CU126, CU130 = (launch.TORCH_WHEELS + build for build in ("cpu", "cu126", "cu130"))

RECORDER = """#!{python}
import json, os, sys
home = {home!r}
with open(home + "/calls.jsonl", "a") as log:
    print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("OMP_NUM_THREADS")]), file=log)
if "pip" in sys.argv and os.path.exists(home + "/fail_at"):
    sys.exit(open(home + "/fail_at").read() in sys.argv)
"""

VENV_STUB = """
import os, sys
folder = sys.argv[1]
os.makedirs(folder + "/bin")
with open(folder + "/bin/python", "w") as file:
    file.write({recorder!r})
os.chmod(folder + "/bin/python", 0o755)
"""

NO_ENSUREPIP = """
import os, sys
os.makedirs(sys.argv[1] + "/bin")
sys.exit("The virtual environment was not created successfully because ensurepip is not available.")
"""

KILLS_ITS_PARENT = """
import os, signal, sys
os.makedirs(sys.argv[1] + "/bin")
open(sys.argv[1] + "/bin/python", "w")
os.kill(os.getppid(), signal.SIGKILL)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the small programs of these tests are POSIX scripts")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what launch.py needs, and the stubs beside it."""
    home = tmp_path / "a studio"  # a space, as in many home folders
    (home / "tests").mkdir(parents=True)
    for name in ("launch.py", *launch.TEST_REQUIREMENTS):
        shutil.copy(ROOT / name, home / name)
    recorder = RECORDER.format(python=sys.executable, home=str(home))
    stub(home, VENV_STUB.format(recorder=recorder))
    return home


def stub(home: Path, venv_module: str) -> None:
    (home / "stubs").mkdir(exist_ok=True)
    (home / "stubs/venv.py").write_text(venv_module)


def start(home: Path, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess:
    settings = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(home / "stubs"), "TORCH_INDEX_URL": "", **more}
    command = [sys.executable, str(home / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd or home, env=settings, capture_output=True, text=True, timeout=60)


def records(home: Path) -> list[tuple[list[str], str, str | None]]:
    """Arguments, working folder and OMP_NUM_THREADS of each start of the environment's interpreter."""
    log = home / "calls.jsonl"
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def calls(home: Path) -> list[list[str]]:
    return [arguments for arguments, _, _ in records(home)]


def pip_targets(home: Path) -> list[str]:
    """What each pip call was asked for: the word after its fixed options."""
    return ["torch" if "torch" in call else "requirements" for call in calls(home) if "pip" in call]


# Old Python


def test_old_python_is_told_what_to_install():
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer; .* is 3\.10\.13") as told:
        launch.require_python((3, 10, 13, "final", 0))
    assert "python3.12 launch.py" in str(told.value)
    launch.require_python((3, 11, 0, "final", 0))
    launch.require_python((4, 0, 0, "final", 0))


def test_old_python_can_parse_the_file_and_checks_first():
    tree = ast.parse((ROOT / "launch.py").read_text(), feature_version=(3, 7))
    calls_check = [isinstance(node, ast.Expr) and "require_python" in ast.dump(node) for node in tree.body]
    before = tree.body[1 : calls_check.index(True)]
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    assert all(isinstance(node, allowed) for node in before)
    assert [node.name for node in before if isinstance(node, ast.FunctionDef)] == ["require_python"]
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert not any(isinstance(node, (ast.Match, ast.NamedExpr)) for node in ast.walk(tree))


# Which torch


def smi(folder: Path, *rows: str, code: int = 0) -> str:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'TABLE'\n" + "\n".join(rows) + f"\nTABLE\nexit {code}\n")
    program.chmod(0o755)
    return str(program)


RTX_4090_570 = "NVIDIA GeForce RTX 4090, 570.124.06, 8.9, 24564"
RTX_4090_580 = "NVIDIA GeForce RTX 4090, 580.65.06, 8.9, 24564"
GTX_1080_580 = "NVIDIA GeForce GTX 1080, 580.65.06, 6.1, 8192"
K80_470 = "Tesla K80, 470.256.02, 3.7, 11441"
FAILED = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    ("platform", "rows", "index"),
    [
        ("linux", [RTX_4090_580], ""),
        ("linux", [RTX_4090_570], CU126),
        ("linux", ["Tesla T4, 525.60.13, 7.5, 15360"], CU126),
        ("linux", ["Tesla T4, 524.99, 7.5, 15360"], CPU),
        ("linux", [GTX_1080_580], CU126),
        ("linux", [RTX_4090_580, GTX_1080_580], CU126),
        ("linux", [K80_470], CPU),
        ("linux", [FAILED], CPU),
        ("linux", [], CPU),
        ("win32", [RTX_4090_580], CU130),
        ("win32", [RTX_4090_570], CU126),
        ("win32", [], ""),
        ("darwin", [], ""),
    ],
)
def test_torch_index_fits_platform_driver_and_gpu(tmp_path, platform, rows, index):
    assert launch.torch_index(platform, launch.find_gpus(smi(tmp_path, *rows))) == index


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "CPU only: the demo works, real models will be slow or will not fit"),
        ([RTX_4090_580], "NVIDIA GeForce RTX 4090, 24 GB"),
        ([RTX_4090_580, GTX_1080_580], "NVIDIA GeForce RTX 4090, 24 GB; NVIDIA GeForce GTX 1080, 8 GB"),
        (["NVIDIA GB10, 580.95.05, 12.1, [N/A]"], "NVIDIA GB10"),
        (["NVIDIA GeForce RTX 5090, 575.51, 12.0, 32607"],
         "NVIDIA GeForce RTX 5090, 32 GB (driver 575 is too old for it: install 580 or newer)"),
    ],
)  # fmt: skip
def test_machine_line_names_gpu_and_memory(tmp_path, rows, line):
    assert launch.describe(launch.find_gpus(smi(tmp_path, *rows))) == line


def test_a_failing_or_missing_nvidia_smi_means_cpu(tmp_path):
    assert launch.find_gpus(smi(tmp_path, FAILED, code=9)) == []
    assert launch.find_gpus(str(tmp_path / "absent")) == []
    assert launch.find_gpus(None) == []


def test_torch_index_is_asked_before_pip_waits_for_it(copy):
    with serve(copy) as address:
        (copy / "torch").mkdir()
        start(copy, TORCH_INDEX_URL=address)
    first, second = [call for call in calls(copy) if "pip" in call]
    assert first[-2:] == ["--extra-index-url", address]
    assert address not in second, "the other packages must not come from torch's index"


def test_an_index_that_does_not_answer_is_left_out_and_said(copy):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/whl"
        began = time.monotonic()
        done = start(copy, TORCH_INDEX_URL=address)
    assert time.monotonic() - began < 10
    assert f"{address} does not answer: taking torch from the usual index" in done.stdout
    assert len(calls(copy)) == 3 and not any(address in call for call in calls(copy))


class serve:
    """A web server of a folder, for the length of a with block; gives its address."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# Set-up and start


def test_first_start_makes_the_environment_then_torch_then_the_rest_then_the_app(copy):
    done = start(copy, "--port", "7999")
    assert done.returncode == 0, done.stderr
    torch, rest, app = calls(copy)
    assert torch[:3] == ["-m", "pip", "install"] and rest[:3] == ["-m", "pip", "install"]
    assert torch[-3:] == ["torch", "--constraint", str(copy / "requirements.txt")], "the pin is the file's"
    assert rest[-2:] == ["--requirement", str(copy / "requirements.txt")]
    assert app == ["-m", "app", "--port", "7999", "--open"]
    assert "CPU only: the demo works" in done.stdout


def test_second_start_goes_straight_to_the_app(copy):
    start(copy)
    done = start(copy, "--no-browser")
    assert calls(copy)[3:] == [["-m", "app"]]
    assert done.stdout == ""


def test_gpu_found_at_set_up_is_named(copy, tmp_path):
    smi(tmp_path, RTX_4090_580)
    done = start(copy, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert "NVIDIA GeForce RTX 4090, 24 GB" in done.stdout


def test_test_installs_its_own_pins_and_leaves_gpu_tests_out(copy):
    start(copy)
    start(copy, "test", "-k", "preset")
    both = [str(copy / name) for name in launch.TEST_REQUIREMENTS]
    assert calls(copy)[4][-4:] == ["--requirement", both[0], "--requirement", both[1]]
    assert calls(copy)[5] == ["-m", "pytest", "-m", "not gpu", "-k", "preset"]
    assert records(copy)[5][2] == "1", "one thread for the suite"
    start(copy)
    assert calls(copy)[6:] == [["-m", "app", "--open"]], "the tests' pins must not unsettle the app's"


def test_changed_pins_are_installed_into_the_same_environment(copy):
    start(copy)
    kept = copy / ".venv/kept"
    kept.touch()
    (copy / "requirements.txt").write_text("torch==2.13.1  # newer\n")
    start(copy)
    assert pip_targets(copy) == ["torch", "requirements"] * 2
    assert kept.exists()


def test_another_torch_index_makes_a_new_environment(copy):
    start(copy)
    stale = copy / ".venv/stale"
    stale.touch()
    with serve(copy) as address:
        start(copy, TORCH_INDEX_URL=address)
    assert not stale.exists(), "pip takes any build of the pinned torch as installed, so the old one must go"


def test_an_interrupted_set_up_is_finished_by_the_next_start(copy):
    (copy / "fail_at").write_text("--requirement")
    done = start(copy)
    assert done.returncode == 1
    assert "The next start goes on from here" in done.stderr
    assert pip_targets(copy) == ["torch", "requirements"], "the app must not start half installed"
    kept = copy / ".venv/kept"
    kept.touch()
    (copy / "fail_at").unlink()
    assert start(copy).returncode == 0
    assert kept.exists(), "what was downloaded is kept"
    assert calls(copy)[-1] == ["-m", "app", "--open"]


def test_a_package_cut_off_by_a_kill_is_installed_again(copy):
    start(copy)
    packages = copy / ".venv/lib/python3/site-packages"
    for name in ("whole", "torn"):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        (packages / f"{name}-1.0.dist-info/METADATA").touch()
    (packages / "whole-1.0.dist-info/RECORD").touch()
    launch.write_stamp(copy / ".venv", {"base": launch.read_stamp(copy / ".venv")["base"]})
    start(copy)
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_an_environment_cut_off_while_it_was_made_is_made_again(copy):
    working = (copy / "stubs/venv.py").read_text()
    stub(copy, KILLS_ITS_PARENT)
    assert start(copy).returncode == -signal.SIGKILL
    stub(copy, working)
    assert start(copy).returncode == 0
    assert pip_targets(copy) == ["torch", "requirements"]


def test_a_lost_interpreter_or_stamp_is_repaired(copy):
    start(copy)
    (copy / ".venv/bin/python").unlink()
    assert start(copy).returncode == 0
    (copy / ".venv/installed").write_text("{ torn")
    assert start(copy).returncode == 0
    assert pip_targets(copy) == ["torch", "requirements"] * 3


def test_a_folder_of_someone_else_is_never_overwritten(copy):
    other = copy / ".venv"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    done = start(copy)
    assert done.returncode == 1
    assert "was not made by launch.py" in done.stderr
    assert (other / "letter.txt").read_text() == "dear" and calls(copy) == []


def test_pip_runs_only_in_the_environment(copy):
    """PEP 668: the recorder is the only interpreter that pip is started with, --venv or not."""
    before = sorted(Path(sys.prefix).rglob("*.dist-info"))
    start(copy, "--venv", "elsewhere")
    assert (copy / "elsewhere/installed").exists() and not (copy / ".venv").exists()
    assert pip_targets(copy) == ["torch", "requirements"]
    assert sorted(Path(sys.prefix).rglob("*.dist-info")) == before


def test_debian_without_venv_is_told_the_package_and_nothing_is_left(copy):
    stub(copy, NO_ENSUREPIP)
    done = start(copy)
    assert done.returncode == 1
    expected = "sudo apt install python3-venv" if Path("/etc/debian_version").exists() else "ensurepip"
    assert expected in done.stderr
    assert not (copy / ".venv").exists()


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path, monkeypatch):
    one_gb = type(shutil.disk_usage("/"))(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: one_gb)
    with pytest.raises(SystemExit, match=r"needs about 9 GB in .* where 1\.0 GB are free"):
        launch.make_venv(tmp_path / "venv", "base", needed_gb=9)
    assert not (tmp_path / "venv/installed").exists()


def test_no_setup_uses_this_interpreter_and_installs_nothing(copy):
    (copy / "app").mkdir()
    program = "import sys; print(sys.executable, sys.argv[1:], sys.flags.utf8_mode)"
    (copy / "app/__main__.py").write_text(program)
    done = start(copy, "--no-setup", "--no-browser", "--port", "1")
    assert done.stdout == f"{sys.executable} ['--port', '1'] 1\n"
    assert not (copy / ".venv").exists() and calls(copy) == []


def test_folders_of_the_app_are_taken_from_where_the_person_stands(copy, tmp_path):
    for given, taken in ((["--workspace", "mine"], ["--workspace", str(tmp_path / "mine")]),
                         (["--workspace=/b", "--models", "m"], ["--workspace=/b", "--models", str(tmp_path / "m")]),
                         (["--root=a", "--root", "/b"], [f"--root={tmp_path / 'a'}", "--root", "/b"])):
        start(copy, *given, "--no-browser", cwd=tmp_path)
        arguments, folder, _ = records(copy)[-1]
        assert arguments == ["-m", "app", *taken]
        assert folder == str(copy)


@pytest.mark.parametrize("part", ["not timed", "timed and"])
def test_all_of_the_suite_runs_and_a_failure_of_either_part_is_passed_on(copy, part):
    (copy / "pytest.py").write_text(
        "import os, sys\nprint(os.environ['OMP_NUM_THREADS'], sys.argv[2])\n"
        f"raise SystemExit(3 if {part!r} in sys.argv[2] else 0)")
    done = start(copy, "--no-setup", "test")
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["1 not gpu and not timed", "1 timed and not gpu"]


def test_a_part_of_the_suite_is_one_call(copy):
    (copy / "pytest.py").write_text("raise SystemExit(3)")
    assert start(copy, "--no-setup", "test", "-k", "preset").returncode == 3


def test_a_warm_start_is_checked_in_a_tenth_of_a_second(copy):
    start(copy)
    program = (
        "import time, launch; began = time.perf_counter();"
        "ready = launch.is_ready(launch.HERE / '.venv', launch.APP_REQUIREMENTS);"
        "print(ready, time.perf_counter() - began)"
    )
    settings = {"PATH": "/usr/bin:/bin", "TORCH_INDEX_URL": ""}
    command = [sys.executable, "-c", program]
    answers = [subprocess.check_output(command, cwd=copy, env=settings, text=True).split() for _ in range(3)]
    assert [ready for ready, _ in answers] == ["True"] * 3
    assert min(float(seconds) for _, seconds in answers) < 0.1
