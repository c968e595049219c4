"""What tests read and change in the files of a checkpoint."""

from __future__ import annotations

import json

from qk.deploy.manifest import checksum


def tensor_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def edit(folder, change, reseal=True):
    """Changes qk.json; reseal: with a checksum that is right, as a program that writes wrong checkpoints would."""
    path = folder / "qk.json"
    fields = json.loads(path.read_text())
    change(fields)
    if reseal:
        fields["checksum"] = checksum(fields)
    path.write_text(json.dumps(fields))


def leaves(value, path=()):
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def set_at(*path, value):
    def change(fields):
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change
