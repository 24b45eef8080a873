"""A process killed at random moments, while it trains or saves, resumes to the same bits."""

import os
import random
import subprocess
import sys
from pathlib import Path

from counting import FUZZ, tried

HERE = Path(__file__).parent
KILLS = 200 if FUZZ else 15


def test_killed_and_resumed(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    source, loops = HERE.parent.parent / "src", HERE.parent / "models_and_loops"
    paths = [source, HERE.parent, loops]
    run = subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), str(tmp_path), str(KILLS), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr}"
    killed, steps = map(int, run.stdout.split())
    assert killed == KILLS < steps
    tried("kills and resumptions", killed)
