"""Tensors that end, or begin, where memory ends: one byte read beyond them kills the process."""

import ctypes
import mmap

import torch

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Guarded:
    """Hands out copies between two pages without access. What it handed out is gone after close()."""

    def __init__(self):
        self._mapped = []

    def copy(self, x: torch.Tensor, at_end: bool) -> torch.Tensor:
        """x, contiguous, with the page without access right behind it (at_end), or else right before it."""
        size = x.numel() * x.element_size()
        if not size or x.device.type != "cpu":
            return x
        pages = -(-size // _PAGE) * _PAGE
        base = _libc.mmap(None, pages + 2 * _PAGE, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value) or _libc.mprotect(base + _PAGE, pages, _READ_WRITE):
            raise OSError(ctypes.get_errno(), "no guarded memory")
        self._mapped.append((base, pages + 2 * _PAGE))
        begin = base + _PAGE + (pages - size if at_end else 0)
        memory = (ctypes.c_char * size).from_address(begin)
        return torch.frombuffer(memory, dtype=x.dtype).reshape(x.shape).copy_(x)

    def close(self):
        for base, size in self._mapped:
            _libc.munmap(base, size)
        self._mapped = []


def main(isa, seeds):
    """Calls every operator on guarded arguments; says what it is about to call, for the one that does not return."""
    import random
    import sys

    import qk
    from test_fuzz import LIKELY, like_any, registered

    qk.force_isa(isa)
    torch.set_num_threads(1)
    for op in registered():
        schema = getattr(torch.ops.qk, op).default._schema
        results = 0
        for seed in range(seeds):
            args = LIKELY.get(op, like_any)(random.Random(seed), schema)
            for at_end in (True, False):
                guarded = Guarded()

                def inside(value, guarded=guarded, at_end=at_end):
                    if isinstance(value, list):
                        return [inside(v) for v in value]
                    return guarded.copy(value, at_end) if isinstance(value, torch.Tensor) else value

                sys.stdout.write(f"{op} seed {seed} {'end' if at_end else 'begin'}\n")
                sys.stdout.flush()
                try:
                    getattr(torch.ops.qk, op)(**{name: inside(value) for name, value in args.items()})
                    results += 1
                except RuntimeError as error:
                    if not str(error).startswith(f"qk::{op}: "):
                        raise
                guarded.close()
        assert results, f"no call of {op} gave a result"
    print("all returned")


if __name__ == "__main__":
    import sys

    main(sys.argv[1], int(sys.argv[2]))
