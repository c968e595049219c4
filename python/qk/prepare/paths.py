"""Where a channel can be scaled without a change of what the model computes: f(s x) = s f(x) between two layers.

A path leads from the output of a layer or of a norm with weights (its source), through operators that keep every
channel apart and commute with a positive factor on it, to layers that read what comes out (its readers), and nothing
else sees what lies on it. Then row i of the source's weight and bias may be divided by s_i, if what the readers
multiply with that channel is multiplied by s_i. Operators are those that ran on the example. Which channel is where is
found by running those that move values once more, on the numbers of the channels in place of the values.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qk.prepare.observe import Observation, Operator, Value
from qk.prepare.prepared import Layer, Path
from qk.prepare.tree import has_hooks

aten = torch.ops.aten

# max(x, a x), value by value, with a given for each channel or for all; and copies
ELEMENTWISE = {
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
    aten._prelu_kernel.default, aten.clone.default,
}  # fmt: skip
CLIPS = {aten.hardtanh.default, aten.hardtanh_.default}
MOVES = {
    aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
    aten.slice.Tensor, aten.select.int,
}  # fmt: skip
# Over windows or all of [.., H, W]; zeros around an image are zeros times s too
POOLS = {
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
}  # fmt: skip
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)


class Blocked(Exception):
    """Why there is no path."""


def find_paths(
    model: nn.Module, seen: Observation, layers: dict[str, Layer], folds: dict[str, str]
) -> tuple[list[Path], dict[str, str]]:
    """Paths in running order, and for every other source the reason why none leads on from it."""
    norm_of = {layer: norm for norm, layer in folds.items()}
    in_storage: dict[int, list[Value]] = defaultdict(list)
    for value in (*seen.read, *seen.results):
        in_storage[value.storage].append(value)
    paths, blocked = [], {}
    for name in seen.calls:
        module = model.get_submodule(name)
        if name not in layers and not (isinstance(module, NORMS) and module._parameters.get("weight") is not None):
            continue
        try:
            _check_source(model, seen, name)
            (value,) = seen.calls[norm_of.get(name, name)][0].outputs
            walk = _Walk(seen, layers, model)
            walk.follow(value, _numbers(module, value))
            if not walk.readers:
                raise Blocked("no layer reads its output")
            walk.check_memory(in_storage, {name, norm_of.get(name, name)})
            paths.append(Path(name, len(module.weight), walk.readers, tuple(dict.fromkeys(walk.clips))))
        except Blocked as reason:
            blocked[name] = str(reason)
    return paths, blocked


def _check_source(model: nn.Module, seen: Observation, name: str) -> None:
    module = model.get_submodule(name)
    if len(seen.calls[name]) != 1:
        raise Blocked("it runs more than once")
    if isinstance(module, NORMS):  # a layer in `layers` was checked when it became one
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
            raise Blocked("its weight is not of one axis")
        if has_hooks(module) or "forward" in vars(module):
            raise Blocked("it has hooks or its own forward")
    own = [p for p in module._parameters.values() if p is not None]
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    places = {p.untyped_storage()._cdata for p in own}
    others = {r for value, readers in seen.readers.items() if value.storage in places for r in readers} - {name}
    if others or any(owners[id(p)] > 1 for p in own):
        raise Blocked("its weight or bias is read elsewhere too")


def channel_axis(module: nn.Module) -> int:
    """Of what a layer or norm gives: 1 of images, -1 of tokens."""
    return -1 if module.weight.dim() == 2 or isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1


def _numbers(module: nn.Module, value: Value) -> Tensor:
    """Of the channel that each value of the module's output is of."""
    axis = channel_axis(module) % len(value.shape)
    numbers = torch.arange(value.shape[axis])
    return numbers.reshape(-1, *[1] * (len(value.shape) - 1 - axis)).expand(value.shape)


class _Walk:
    """From a value to all that reads it, and on."""

    def __init__(self, seen: Observation, layers: dict[str, Layer], model: nn.Module) -> None:
        self.seen, self.layers, self.model = seen, layers, model
        self.readers: dict[str, Tensor] = {}
        self.clips: list[str] = []
        self.followed: set[Value] = set()

    def follow(self, value: Value, numbers: Tensor) -> None:
        """numbers: of the channel that each value is of; of the shape of value."""
        if value in self.followed:  # a view of a view is what it was before
            return
        self.followed.add(value)
        if value in self.seen.results:
            raise Blocked("its output is returned")
        for operator in self.seen.read[value]:
            if operator.module in self.layers:
                self._reads(operator.module, value, numbers)
            elif operator.outputs != (value,):  # a view that changes nothing
                self.follow(operator.outputs[0], self._through(operator, value, numbers))

    def _reads(self, name: str, value: Value, numbers: Tensor) -> None:
        layer, calls = self.layers[name], self.seen.calls[name]
        if layer.calls != 1:
            raise Blocked(f"{name}, which reads it, runs more than once")
        if calls[0].inputs != (value,):
            return  # inside the layer, of which the input is followed
        rows = numbers.movedim(1 if layer.kind == "conv2d" else -1, 0).flatten(1)
        if (rows != rows[:, :1]).any():
            raise Blocked(f"its channels are mixed in the input of {name}")
        self.readers[name] = rows[:, 0].clone()

    def check_memory(self, in_storage: dict[int, list[Value]], own: set[str]) -> None:
        """Raises Blocked where the memory that was followed is read in another way: under a view of what was there
        before something on the path wrote into it. own: modules that make what the path starts from."""
        first: dict[int, int] = {}
        for value in self.followed:
            first[value.storage] = min(value.version, first.get(value.storage, value.version))
        inside = own | self.readers.keys()
        for storage, version in first.items():
            for value in in_storage[storage]:
                if value.version < version or value in self.followed:
                    continue
                others = [o.module for o in self.seen.read.get(value, ()) if o.module not in inside]
                if others or value in self.seen.results:
                    raise Blocked(f"its memory is read elsewhere too: in {others[0] if others else 'the result'}")

    def _through(self, operator: Operator, value: Value, numbers: Tensor) -> Tensor:
        """The numbers of what the operator gives."""
        function, args, out = operator.function, operator.args, operator.outputs[0]
        where = _words(operator)
        if not args or (args[0] != value and not _is_weighted_sum(function)):
            raise Blocked(f"its output goes through {where}, which keeps no factor")
        if function in ELEMENTWISE:
            return numbers
        if function in CLIPS:
            module = self.model.get_submodule(operator.module)
            if type(module) is not nn.ReLU6 or len(self.seen.calls[operator.module]) != 1 or has_hooks(module):
                raise Blocked(f"its output goes through {where}, which keeps no factor")
            self.clips.append(operator.module)
            return numbers
        if function in MOVES:
            laid = torch.empty_strided(value.shape, _dense(value), dtype=numbers.dtype).copy_(numbers)
            return function(laid, *args[1:], **operator.kwargs)
        if function in POOLS and len(value.shape) == 4 and (numbers == numbers[:, :, :1, :1]).all():
            return numbers[:, :, :1, :1].expand(out.shape)
        if function is aten.mean.dim:
            lowest = numbers.amin(*args[1:], **{k: v for k, v in operator.kwargs.items() if k == "keepdim"})
            if torch.equal(lowest, numbers.amax(*args[1:3])):
                return lowest
        if (
            _is_weighted_sum(function)
            and args.index(value) == len(_summed(function)) - 1
            and out.shape[:-2] == value.shape[:-2]
            and (numbers == numbers[..., :1, :]).all()
        ):
            return numbers[..., :1, :].expand(out.shape)
        raise Blocked(f"its output goes through {where}, which keeps no factor")


def _is_weighted_sum(function: object) -> bool:
    """Whether the last of its operands is summed with weights along the axis before the last: attention's values."""
    return bool(_summed(function))


def _summed(function: object) -> tuple[str, ...]:
    if function is aten.bmm.default:
        return ("weights", "values")
    if str(function).startswith("aten._scaled_dot_product"):
        return ("query", "key", "values")
    return ()


def _dense(value: Value) -> tuple[int, ...]:
    """The value's strides; where values overlap (an expanded tensor), those of a contiguous one."""
    if 0 in value.stride:
        return torch.empty(value.shape, device="meta").stride()
    return value.stride


def _words(operator: Operator) -> str:
    """add, for messages."""
    return str(operator.function).removeprefix("aten.").split(".")[0].strip("_")
