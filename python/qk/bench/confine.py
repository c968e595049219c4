"""A process without AMX, for itself and all libraries in it: what a processor with AVX-512 VNNI alone would show."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

CONFINEMENTS = ("none", "vnni")

_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023  # x86-64; ARCH_REQ_XCOMP_PERM
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def deny_amx() -> None:
    """Linux gives a process the state of AMX's tiles only when asked for; from now on the answer is no.

    Must run before a library that would ask is loaded. Raises OSError where the system takes no such filter.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    program = [  # of struct seccomp_data: the number of the call at 0, its first argument at 16
        (_LOAD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 3, _ARCH_PRCTL),
        (_LOAD, 0, 0, 16),
        (_JUMP_IF_EQUAL, 0, 1, _REQUEST_PERMISSION),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    prog = Program(len(program), ctypes.addressof(code))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, ctypes.byref(prog)):
        raise OSError(ctypes.get_errno(), "the system refuses a filter of system calls")


def main() -> None:
    """python confine.py PROGRAM ARGUMENTS: runs the program so confined, which no library in it can undo."""
    deny_amx()
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
