"""What every benchmark shares lives in the package, where `qk bench` uses it too."""

from qk.bench.harness import Case, alternate, copy_of, forward_backward, machine, main, measure, options

__all__ = ["Case", "alternate", "copy_of", "forward_backward", "machine", "main", "measure", "options"]
