#!/bin/sh
# Names what a machine lacks to build qk, and how to get it; says nothing when all is there.
python=${1:-python3}
missing=0
lacks() {
  printf 'qk: %s\n    %s\n' "$1" "$2" >&2
  missing=1
}

if ! command -v "$python" >/dev/null; then
  lacks "$python is missing (Python 3.10 or later)." "Debian, Ubuntu: apt-get install python3 python3-venv python3-dev"
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    lacks "$python must be 3.10 or later, got $("$python" -V 2>&1)." "Name another one: make PYTHON=python3.12 ..."
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    lacks "$python cannot make virtual environments." "Debian, Ubuntu: apt-get install python3-venv"
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    lacks "$python has no headers (Python.h)." "Debian, Ubuntu: apt-get install python3-dev. Fedora: dnf install python3-devel"
fi
found=
for compiler in ${CXX:-c++ g++ clang++}; do
  command -v "$compiler" >/dev/null && found=$compiler && break
done
if [ -z "$found" ]; then
  lacks "a C++17 compiler is missing (looked for ${CXX:-c++, g++, clang++})." \
    "Debian, Ubuntu: apt-get install g++. Fedora: dnf install gcc-c++. macOS: xcode-select --install"
elif ! printf '#include <optional>\nint main() { return std::optional<int>(0).value(); }\n' |
  "$found" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then
  lacks "$found does not compile C++17." "Install GCC 9 or clang 10 or later, or name one: make CXX=g++-13 ..."
fi
exit $missing
