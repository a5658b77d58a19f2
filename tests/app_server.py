"""The app as a process for the browser tests, with the stand-in for the trainer, and a demo of 40 steps."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
DEMO = '[model]\nfamily = "sd15"\nbase = "base"\n[data]\nfolder = "pictures"\n[train]\nsteps = 40\n'


def main(port: int, workspace: Path, pace: str, password: str | None) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(workspace / "cache" / "gradio")
    from app import ui
    from app.jobs import Jobs
    from app.paths import Places
    from app.tabs import train

    train.DEMO = workspace / "demo.toml"
    train.DEMO.write_text(DEMO)
    roots = tuple(filter(Path.is_dir, [workspace / "root"]))
    jobs = Jobs(Places(workspace, roots), (sys.executable, str(HERE / "app_trainer.py"), "--pace", pace))
    ui.launch(jobs, host="127.0.0.1", port=port, password=password)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
