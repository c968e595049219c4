"""A search as a process of its own, for tests in which several share a folder: python shared.py FOLDER KIND SECONDS.

Each part takes SECONDS more, so that there is time to kill it; what it works on is printed."""

import sys
import time

import torch

import qk
from qk.search.parts import Parts
from search.small import data, net


def main(folder, kind, seconds):
    torch.set_num_threads(1)
    search = qk.Search(qk.prepare(net(), data(1)[0]), data(6), folder=folder)
    all_parts = Parts.all

    def slowly(self, count, compute):
        def part(number):
            print(number, flush=True)
            time.sleep(seconds)
            return compute(number)

        return all_parts(self, count, part)

    Parts.all = slowly
    search.sensitivity(kind)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
