"""Prints as JSON what one rank sends in a few collectives, in a fake world of 4 ranks and in a gloo world of one.

A process of its own: that of the tests may have a process group.
"""

import json

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from nitp_titan.sizing.trace import as_rows, trace

LENGTH = 8


def in_place() -> None:
    x, size = torch.ones(LENGTH), dist.get_world_size()
    dist.all_gather_into_tensor(torch.empty(size * LENGTH), x)
    dist.reduce_scatter_tensor(torch.empty(LENGTH), torch.ones(size * LENGTH))
    dist.all_reduce(x)
    dist.all_to_all_single(torch.empty(size * LENGTH), torch.ones(size * LENGTH))
    dist.broadcast(x, src=0)


def functional() -> None:
    x, size = torch.ones(LENGTH), dist.get_world_size()
    group = dist.group.WORLD
    funcol.all_gather_tensor(x, 0, group).sum()
    funcol.reduce_scatter_tensor(torch.ones(size * LENGTH), "sum", 0, group).sum()
    funcol.all_reduce(x, "sum", group).sum()
    funcol.all_to_all_single(torch.ones(size * LENGTH), None, None, group).sum()
    funcol.broadcast(x, 0, group).sum()


def fake() -> dict[str, list]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    found = {step.__name__: as_rows(trace(step).collectives) for step in (in_place, functional)}
    with FakeTensorMode():
        found |= {f"{step.__name__}, fake": as_rows(trace(step).collectives) for step in (in_place, functional)}
    group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")).get_group("tp")
    found["axis"] = as_rows(trace(lambda: dist.all_reduce(torch.ones(LENGTH), group=group)).collectives)
    dist.destroy_process_group()
    return found


def gloo() -> dict[str, list]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {step.__name__: as_rows(trace(step).collectives) for step in (in_place, functional)}


if __name__ == "__main__":
    print(json.dumps({"fake": fake(), "gloo": gloo()}))
