"""Started by torchrun with ``WRAPPER DEATH FOLDER``: training that is killed once, and goes on where it saved.

WRAPPER is ``ddp`` or ``fsdp``. DEATH is ``never``, ``backward`` (rank 1 kills itself in a backward pass) or
``saving`` (rank 0 kills itself with half of a checkpoint written). A killed run differs in nothing else.
"""

import os
import pathlib
import shutil
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import MARK, others_can_connect, processes_of
from leaving import leave
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, SAVE_EVERY, DIES_AT = (
    11,
    4,
    6,
)  # T = 3: the factors are not due in the first step after a restart
LIFE = os.environ["TORCHELASTIC_RESTART_COUNT"]
FIRST_LIFE = LIFE == "0"


def start_group():
    """The default process group, with keys of its own in torchrun's store for each life.

    Without them the second life finds the addresses of the first, and hangs (pytorch/pytorch#135712). The other
    way is ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: then rank 0 opens a store, but on all interfaces.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"life {LIFE}", dist.TCPStore(host, port, is_master=False)),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=20),
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class OneFile:
    """DDP: all ranks hold the same, so rank 0 writes one file; a rename shows it whole or not at all."""

    def __init__(self, model, optimizer, schedule, folder):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.path = folder / "last.pt"

    def save(self, step, interrupted):
        if dist.get_rank() != 0:
            return
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "step": step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            part,
        )
        if interrupted:
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
            die()
        os.replace(part, self.path)

    def load(self):
        if not self.path.exists():
            return 0
        saved = torch.load(self.path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        return saved["step"]


class OneFolder:
    """FSDP2: every rank writes its shards into one folder, renamed when all have written."""

    def __init__(self, model, optimizer, schedule, folder):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.folder = folder

    def state(self, step):
        weights, states = get_state_dict(self.model, self.optimizer)
        rest = {"step": step, "schedule": self.schedule.state_dict()}
        return {"model": weights, "optimizer": states, **rest}

    def save(self, step, interrupted):
        part = self.folder / "part"
        if dist.get_rank() == 0 and part.exists():
            shutil.rmtree(part)  # of a life that ended while it wrote
        dist.barrier()
        dcp.save(self.state(step), checkpoint_id=part)
        if dist.get_rank() == 0:
            if interrupted:
                die()
            os.rename(part, self.folder / f"step{step:04}")
        dist.barrier()

    def load(self):
        saved = sorted(self.folder.glob("step*"))
        if not saved:
            return 0
        state = self.state(0)
        dcp.load(state, checkpoint_id=saved[-1])
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        return state["step"]


def main(wrapper, death, folder):
    start_group()
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, batches = model_and_batches("mlp", steps=STEPS, batch=8)
    model.insert(1, nn.LayerNorm(8))  # trained by the fallback
    model = model.float()
    if wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[0], mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    else:
        trained = DistributedDataParallel(model)
    optimizer = SINGD(trained, lr=0.05, lr_cov=0.2, damping=0.1, T=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    checkpoints = {"ddp": OneFile, "fsdp": OneFolder}[wrapper](
        model, optimizer, schedule, pathlib.Path(folder)
    )
    start = checkpoints.load()
    if rank == 0:
        assert not others_can_connect(processes_of(os.environ[MARK]))
        print(f"life {LIFE} starts at {start}", flush=True)
    for step in range(start, STEPS):
        dies = FIRST_LIFE and step == DIES_AT
        x, y = (t.chunk(ranks)[rank] for t in batches[step])
        optimizer.zero_grad()
        output = trained(x.float())
        if dies and death == "backward" and rank == 1:
            output.register_hook(lambda _: die())
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % SAVE_EVERY == 0:
            checkpoints.save(step + 1, FIRST_LIFE and death == "saving" and step > DIES_AT)
    weights, states = get_state_dict(model, optimizer)
    end = {"model": weights, "optimizer": states["state"]}
    end = torch.utils._pytree.tree_map(lambda t: getattr(t, "full_tensor", lambda: t)(), end)
    if rank == 0:
        torch.save(end, pathlib.Path(folder, "end.pt"))
    leave("finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
