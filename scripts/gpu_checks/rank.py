"""One of two processes of the check `ranks`: python -m gpu_checks.rank FOLDER DEVICE SMALL"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from flexip_core.training.ranks import Ranks
from gpu_checks.training import _tiny_trainer

NUMBERS = (134_000_000, 781_000_000)  # of SD1.5's and SDXL's adapters


def main(folder: Path, device: str, small: bool) -> None:
    # not ranks.joined: two processes on one GPU cannot talk by NCCL
    dist.init_process_group("gloo")
    ranks = Ranks(int(os.environ["RANK"]), 2, 0)
    trainer = _tiny_trainer(folder / "two", device, ranks=ranks, batch=8)
    for _ in range(3):
        trainer.step()
    seconds = {}
    for count in (1000,) if small else NUMBERS:
        numbers = torch.full((count,), float(ranks.rank + 1), device=device)
        begin = time.perf_counter()
        ranks.sum(numbers)
        seconds[str(count)] = time.perf_counter() - begin
        assert numbers[0] == 3 and numbers[-1] == 3
        del numbers
    if ranks.first:
        weights = {key: value.cpu() for key, value in trainer.network.state_dict().items()}
        torch.save({"network": weights, "seconds": seconds}, folder / "two.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True")
