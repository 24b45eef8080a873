"""Makes checkpoint_format_N.pt for the N of this version, which every later version must read.

Run once per format, from the repository's root:

    PYTHONPATH=src:tests/models_and_loops python tests/data/make_checkpoint.py
"""

import copy
from pathlib import Path

import torch
from small import build, train

from singd.groups import FORMAT

STEPS = 3

if __name__ == "__main__":
    path = Path(__file__).parent / f"checkpoint_format_{FORMAT}.pt"
    if path.exists():
        raise SystemExit(f"{path.name} exists; the point of it is that it stays as it was made.")
    model, optimizer = build()
    train(model, optimizer, range(STEPS))
    saved = {
        "step": STEPS,
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": optimizer.state_dict(),
    }
    train(model, optimizer, range(STEPS, STEPS + 4))
    saved["model 4 steps later"] = dict(model.state_dict())
    torch.save(saved, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")
