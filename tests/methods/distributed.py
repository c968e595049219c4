"""Two processes that train one LSQ model: python distributed.py. Each rank prints "equal" when all is as it must be."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qk


def made(calibrate_on):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)]
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 10
    p = qk.prepare(nn.Sequential(*layers), x, qk.Recipe(weights=3, activations=4))
    qk.calibrate(p, [x[calibrate_on]])
    return p, x, labels


def train(model, x, labels):
    optimizer = torch.optim.SGD(qk.param_groups(model), lr=0.01, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def rank(number, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    half = slice(4 * number, 4 * number + 4)
    # Calibrated on other data at each rank: the first rank's steps and zeros count.
    p, x, labels = made(slice(None) if number == 0 else half)
    model = qk.trainable(p).train()
    train(DistributedDataParallel(model), x[half], labels[half])
    mine = torch.cat([t.detach().double().reshape(-1) for t in model.state_dict().values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)

    # Halves of a batch, averaged, are the whole batch: N counts the features of a sample, not the batch. Sums in
    # another order flip no code here, so parameters differ by roundings alone.
    alone, x, labels = made(slice(None))
    whole = qk.trainable(alone).train()
    train(whole, x, labels)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(qk.convert(p)(x), qk.convert(p)(x))
    print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (f"{folder}/store",), nprocs=2, start_method="fork")
