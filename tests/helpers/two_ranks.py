"""Script that test_engines.py runs on two ranks: a trainer's process group and, in each rank, a vLLM engine of its own.

Ranks start and use their engines out of step, which works only if no engine waits for another rank's.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator

from posttrain.engines.base import Sampling
from posttrain.engines.vllm import VllmEngine


def main(model: str) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert (dist.get_world_size(), dist.get_backend()) == (2, "gloo")
    time.sleep(2 * rank)
    engine = VllmEngine(model, max_model_len=64, cache_mb=16, max_concurrent=8)
    assert (dist.get_world_size(), dist.get_rank()) == (2, rank)
    net = accelerator.prepare(torch.nn.Linear(4, 4))
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    for step in range(3):
        for _ in range(1 + rank):
            completion = engine.generate([[5 + rank, 6, 7]], sampling, seeds=[step])[0][0]
        accelerator.backward(net(torch.ones(1, 4) * (rank + 1)).sum())
        gathered = [None, None]
        dist.all_gather_object(gathered, (rank, completion.tokens), group=dist.new_group([0, 1]))
    engine.close()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    gradient = accelerator.unwrap_model(net).weight.grad[0, 0].item()
    if accelerator.is_main_process:
        print(json.dumps({"gathered": gathered, "total": total.item(), "gradient": gradient}), flush=True)
    del net
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
