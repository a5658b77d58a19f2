"""No kill at any moment loses or halves a caption, and undo restores every byte: 500 random sequences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_500_sequences_of_edits_undo_redo_and_kills_keep_every_byte():
    done = subprocess.run([sys.executable, "-m", "tests.captions_fuzz", "--sequences", "500"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["sequences"] == 500 and told["kills"] > 1000 and told["loaded"] == []
