"""How far a reader of one step has to walk: prints the files and functions that it runs through.

PYTHONPATH=src python tests/trace_a_step.py
"""

import collections
import pathlib
import sys

import torch
from torch import nn

import singd

SOURCE = pathlib.Path(singd.__file__).parent


def walk(structures=("dense", "dense")):
    """The files of singd that one forward, backward and step of a linear layer enters, one entry per change."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    optimizer = singd.SINGD(model, **(singd.PUBLISHED | {"structures": structures}))
    x = torch.randn(8, 7)
    entered: list[tuple[str, str]] = []

    def profile(frame, event, argument):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and SOURCE in path.parents:
            entered.append((str(path.relative_to(SOURCE)), frame.f_code.co_name))

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first step also makes the state
    optimizer.param_groups[0]["T"] = 1
    sys.setprofile(profile)
    step()
    sys.setprofile(None)
    files = [file for file, _ in entered]
    changes = [file for i, file in enumerate(files) if i == 0 or files[i - 1] != file]
    return entered, changes


if __name__ == "__main__":
    entered, changes = walk()
    print(
        f"{len(set(changes))} files, {len(set(entered))} functions, {len(changes)} changes of file"
    )
    for file, count in collections.Counter(changes).most_common():
        names = dict.fromkeys(name for f, name in entered if f == file)
        print(f"{count:4d} {file}: {', '.join(names)}")
