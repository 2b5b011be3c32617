"""One of two processes that feed metrics unevenly and print the results; test_distributed_metrics starts it."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from lit_matting.metrics.matting import SAD, Conn
from lit_matting.metrics.referring import ReferringScore


def scenes(count: int) -> list[tuple[torch.Tensor, torch.Tensor, int, str]]:
    """Return ``count`` samples of different sizes: matte, instances, referred instance, image."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index in range(count):
        size = 16 + 4 * (index // 2)
        instances = torch.zeros(2, size, size)
        instances[0, :6, :6] = 1
        instances[1, 8:, 8:] = 0.8
        matte = (instances[index % 2] + 0.3 * torch.randn(size, size, generator=generator)).clamp(0, 1)
        samples.append((matte, instances, index % 2, f"image {index // 2}"))
    return samples


def run(rank: int, world: int, count: int) -> dict:
    """Return what the metrics say after this rank's share; rank 1 gets none of the last half."""
    referring, sad, conn = ReferringScore(), SAD(keep_samples=True), Conn()
    for index, (matte, instances, instance, key) in enumerate(scenes(count)):
        owner = index % 2 if index < count // 2 else 0
        if world == 2 and owner != rank:
            continue
        kind = ("colour", "position")[index % 3 == 0]
        referring.update([matte], [instances], [instance], [key], [f"the thing {instance}"], [kind])
        sad.update([matte], [instances[instance]])
        conn.update([matte], [instances[instance]])
    result = {"card": referring.compute(), "sad": float(sad.compute()), "conn": float(conn.compute())}
    result["samples"] = sorted(sad.per_sample().tolist())
    return result


if __name__ == "__main__":
    rank, world, count, store = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    print(json.dumps(run(rank, world, count)))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
