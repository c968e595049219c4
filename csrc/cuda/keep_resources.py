"""Runs a CUDA compiler and puts what ptxas says about each kernel into OBJECT.ptxas beside its object file."""

import re
import subprocess
import sys
from pathlib import Path

PTXAS = re.compile(r"ptxas info|\d+ bytes stack frame|^\s*$")

command = [word for word in sys.argv[1:] if word]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
lines = done.stderr.splitlines(keepends=True)
sys.stderr.writelines(line for line in lines if not PTXAS.search(line))
if done.returncode == 0 and "-o" in command:
    target = Path(command[command.index("-o") + 1])
    if target.suffix == ".o":
        target.with_name(target.name + ".ptxas").write_text("".join(line for line in lines if PTXAS.search(line)))
sys.exit(done.returncode)
