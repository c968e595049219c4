"""Save and load an integer model: safetensors for numbers, qk.json for everything else. Never pickle.

qk.json is what makes a checkpoint: it is put in place last, by a rename, and names the file with the tensors by its
content. A save that dies half-way leaves the checkpoint of before.
"""

from __future__ import annotations

import copy
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qk.deploy.convert import Info
from qk.deploy.embedding import BAG, QEmbedding, QEmbeddingBag, table_modules
from qk.deploy.manifest import (
    ASK_AGAIN,
    FILE,
    FORMAT,
    PLACES,
    STAGE,
    LayerConfig,
    Manifest,
    TableConfig,
    TensorFile,
    read_manifest,
    under,
)
from qk.deploy.modules import TENSORS, IntegerLayer, QConv2d, QLinear, integer_layers
from qk.errors import QkError, fail
from qk.files import TEMPORARY, replace_file
from qk.machine import qk_version
from qk.prepare.insert import padding_of
from qk.prepare.joins import place
from qk.prepare.projections import ProjectedAttention, projectable, projected_copy
from qk.prepare.source import call_every_layer, check_device
from qk.spec import Plan

TABLES = {"embedding": (nn.Embedding, QEmbedding), "embedding_bag": (nn.EmbeddingBag, QEmbeddingBag)}
KINDS = {"linear": (nn.Linear, QLinear), "conv2d": (nn.Conv2d, QConv2d)}


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes the integer model (of qk.convert or qk.load) into `folder`, which is made when it is not there.

    A float model in which tables of qk.quantize_embedding stand is one too.

    Returns the folder. A checkpoint that is there already is replaced as a whole or not at all.
    Raises QkError for a model that is not an integer one, or holds state that is no tensor, and for a path that cannot
    be written.
    """
    folder = Path(folder)
    info = getattr(model, "qk_info", None)
    tables = table_modules(model) if isinstance(model, nn.Module) else {}
    if info is None and tables:
        info = Info(Plan({}))
    layers = integer_layers(model) if isinstance(info, Info) else {}
    if not layers and not tables:
        raise fail("qk.save", "model", "the result of qk.convert or qk.load", type(model).__name__)
    check_state(model, "qk.save")
    tensors, tied = unshared(model)
    content = tensor_bytes(tensors)
    file = TensorFile(bytes=len(content), sha256=sha256(content).hexdigest())
    manifest = Manifest(
        format=FORMAT,
        qk=qk_version(),
        torch=torch.__version__,
        tensors=file,
        plan=info.plan,
        layers={name: _config(layer) for name, layer in layers.items()},
        folds=info.folds,
        kept=info.kept,
        links=[list(link) for link in info.links],
        modules=_classes(model),
        tied=tied,
        history=info.history,
        fingerprint=info.fingerprint,
        new_biases=info.new_biases,
        unclipped=info.unclipped,
        joins={name: list(readers) for name, readers in info.joins.items()},
        tables={name: _table_config(table) for name, table in tables.items()},
    )
    try:
        replace_file(folder / file.name, content)
        replace_file(folder / FILE, manifest.to_text().encode())
        ours = rf"model-[0-9a-f]{{16}}\.safetensors|{re.escape(TEMPORARY)}\w+"
        for old in folder.iterdir():  # of earlier saves, whole or not
            if old.name != file.name and re.fullmatch(ours, old.name):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise fail("qk.save", str(folder), "a folder that can be written", error.strerror or error) from error
    return folder


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The integer model in `folder`. model: the float model of the same architecture; its weights do not matter.

    Returns a new model in eval mode, on the device of `model`, which is not changed. Outputs equal those of the saved
    one bit for bit. Everything is checked before anything is built: QkError says which file, field, layer or tensor
    does not fit, for a checkpoint that is cut short, edited, newer than this qk, or of another model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / manifest.tensors.name
    tensors = _read_tensors(path, manifest.tensors)
    model = _projected(manifest, model)
    _check_modules(folder, manifest, model)
    result = _build(path, manifest, tensors, model)
    _fill(path, manifest, tensors, result)
    result.eval()
    joins = {name: tuple(readers) for name, readers in manifest.joins.items()}
    place(result, joins)
    result.qk_info = Info(
        plan=manifest.plan,
        links=[tuple(link) for link in manifest.links],
        folds=manifest.folds,
        kept=manifest.kept,
        history=manifest.history,
        fingerprint=manifest.fingerprint,
        new_biases=manifest.new_biases,
        unclipped=manifest.unclipped,
        joins=joins,
    )
    return result


def checkpoint_bytes(folder: str | Path) -> int:
    """Size on disk of a checkpoint."""
    folder = Path(folder)
    return read_manifest(folder).tensors.bytes + (folder / FILE).stat().st_size


def file_bytes(model: nn.Module) -> int:
    """Size of a model as one safetensors file: each dense tensor once, and the header."""
    return len(tensor_bytes(unshared(model)[0]))


# --- writing ----------------------------------------------------------------------------------------------------------


def check_state(model: nn.Module, stage: str) -> None:
    """Raises QkError for state that a checkpoint cannot hold."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            advice = f"Save the extra state of {name.rpartition('.')[0]} on your own."
            raise fail(stage, f"state {name}", "a tensor", type(tensor).__name__, advice)
        if not _is_dense(tensor):
            raise fail(stage, f"state {name}", "a dense tensor with values", f"{tensor.layout} on {tensor.device}")


def unshared(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The dense tensors of the state on the CPU, each once, and name -> stored name of the others: safetensors shares
    nothing."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not _is_dense(tensor):
            continue
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            stored[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return stored, tied


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _config(layer: IntegerLayer) -> LayerConfig:
    extra = 0 if layer.tail_owners is None else len(layer.tail_owners)
    common = {"weight_shape": list(layer.shape), "bias": layer.bias is not None, "extra_rows": extra}
    if isinstance(layer, QLinear):
        return LayerConfig(kind="linear", **common)
    conv = {name: getattr(layer, name) for name in (*PLACES, "contiguous")}
    return LayerConfig(kind="conv2d", **common, **conv)


def _table_config(table: QEmbedding | QEmbeddingBag) -> TableConfig:
    bag = {"mode": table.mode, "include_last_offset": table.include_last_offset} if hasattr(table, "mode") else {}
    names = ("cols", "bits", "dtype", "codes_first", "method", "error", "padding_idx")
    common = {name: getattr(table, name) for name in names} | {"row_kind": table.kind, "rows": table.num_embeddings}
    books = None if table.books is None else len(table.books)
    return TableConfig(kind="embedding_bag" if bag else "embedding", books=books, **common, **bag)


def _classes(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_tensors(path: Path, expected: TensorFile) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise fail(STAGE, str(path), f"there, as {FILE} names it", "no such file", "Copy the whole folder.") from None
    except OSError as error:
        raise fail(STAGE, str(path), "readable", error.strerror) from error
    if len(content) != expected.bytes:
        raise fail(STAGE, str(path), f"{expected.bytes} bytes long", f"{len(content)} bytes", ASK_AGAIN)
    digest = sha256(content).hexdigest()
    if digest != expected.sha256:
        raise fail(STAGE, f"{path}: sha256", expected.sha256, digest, ASK_AGAIN)
    try:
        return parse_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise fail(STAGE, str(path), "a safetensors file", str(error)[:200], ASK_AGAIN) from error


def _projected(manifest: Manifest, model: nn.Module) -> nn.Module:
    """The model with projections where the checkpoint has them."""
    if not isinstance(model, nn.Module):
        return model
    names = [n for n in projectable(model) if manifest.modules.get(n) == ProjectedAttention.__name__]
    return projected_copy(model, names)


def _check_modules(folder: Path, manifest: Manifest, model: nn.Module) -> None:
    """Raises QkError unless `model` is what the checkpoint was made of: the same modules, layers of the same shapes."""
    if not isinstance(model, nn.Module):
        raise fail(STAGE, "model", "the float nn.Module that was quantized", type(model).__name__)
    if integer_layers(model) or table_modules(model):
        raise fail(STAGE, "model", "the float model", "one with integer layers or tables", "Build it anew.")
    check_device(model, STAGE)
    there = dict(model.named_modules(remove_duplicate=False))
    where, kind_of_model = f"{folder / FILE}: modules", type(model).__name__
    advice = "Is the checkpoint of another model?"
    for names, verb in ((manifest.modules.keys() - there, "lacks"), (there.keys() - manifest.modules, "has too")):
        if names:
            got = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise fail(STAGE, where, f"those of the model ({kind_of_model})", f"{got}, which the model {verb}", advice)
    first: dict[int, str] = {}
    for name, kind in manifest.modules.items():
        module = there[name]
        original = first.setdefault(id(module), name)
        if name != original and manifest.modules[original] == kind:  # one module under two names
            continue
        if name in manifest.layers:
            given = name in manifest.folds.values() or name in manifest.new_biases
            _check_layer(folder, name, manifest.layers[name], module, given)
        elif name in manifest.tables:
            _check_table(folder, name, manifest.tables[name], module)
        elif name in manifest.folds:
            if not isinstance(module, _BatchNorm):
                raise fail(STAGE, f"{where}.{name}", "a folded BatchNorm", type(module).__name__, advice)
        elif type(module).__name__ != ("ReLU6" if name in manifest.unclipped else kind):
            what = f"{where}.{name}" if name else f"{where}: the model itself"
            raise fail(STAGE, what, kind, type(module).__name__, advice)


def _check_layer(folder: Path, name: str, config: LayerConfig, module: nn.Module, bias_is_given: bool) -> None:
    where = f"model: layer {name or 'itself'}"
    advice = f"{folder / FILE} is the checkpoint of another model, or it was edited."
    if not isinstance(module, KINDS[config.kind][0]):
        raise fail(STAGE, where, f"a {config.kind}", type(module).__name__, advice)
    conv = {name: getattr(config, name) for name in PLACES} if config.kind == "conv2d" else {}
    expected: dict[str, Any] = {"weight shape": tuple(config.weight_shape), **conv}
    n, *rest = module.weight.shape
    got: dict[str, Any] = {"weight shape": (n, *rest[1:], rest[0]) if len(rest) == 3 else (n, *rest)}
    if not bias_is_given:  # by a fold, or a correction
        expected["bias"], got["bias"] = config.bias, module.bias is not None
    if isinstance(module, nn.Conv2d):
        got |= {
            "stride": module.stride,
            "padding": padding_of(module),
            "dilation": module.dilation,
            "groups": module.groups,
        }
    for field, value in expected.items():
        if got[field] != value:
            raise fail(STAGE, f"{where}: {field}", value, got[field], advice)


def _check_table(folder: Path, name: str, config: TableConfig, module: nn.Module) -> None:
    where = f"model: table {name or 'itself'}"
    advice = f"{folder / FILE} is the checkpoint of another model, or it was edited."
    if not isinstance(module, TABLES[config.kind][0]):
        raise fail(STAGE, where, TABLES[config.kind][0].__name__, type(module).__name__, advice)
    expected: dict[str, Any] = {"shape": (config.rows, config.cols), "max_norm": None}
    got: dict[str, Any] = {"shape": tuple(module.weight.shape), "max_norm": module.max_norm}
    for field in BAG if config.kind == "embedding_bag" else ():
        expected[field], got[field] = getattr(config, field), getattr(module, field)
    for field, value in expected.items():
        if got[field] != value:
            raise fail(STAGE, f"{where}: {field}", value, got[field], advice)


def _build(path: Path, manifest: Manifest, tensors: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """A copy of the float model with integer layers and without folded norms; floats are not filled in yet."""
    there = dict(model.named_modules(remove_duplicate=False))
    new: dict[int, nn.Module] = {id(there[name]): nn.Identity() for name in manifest.folds}
    new |= {id(there[name]): nn.ReLU(inplace=there[name].inplace) for name in manifest.unclipped}
    for name, config in manifest.layers.items():
        if id(there[name]) in new:  # a layer of several names
            continue
        own = {key: tensors.get(manifest.tied.get(full, full)) for key in TENSORS for full in [under(name, key)]}
        if config.bias == (own["bias"] is None):
            expected = "there" if config.bias else "absent"
            raise fail(STAGE, f"{path}: {under(name, 'bias')}", expected, "the opposite", ASK_AGAIN)
        rows = 0 if own["tail_owners"] is None else own["tail_owners"].numel()
        if rows != config.extra_rows:
            raise fail(STAGE, f"{path}: {under(name, 'tail_owners')}", f"{config.extra_rows} rows", rows, ASK_AGAIN)
        try:
            layer = KINDS[config.kind][1](own, manifest.plan[name], tuple(config.weight_shape), **config.conv_args())
            new[id(there[name])] = layer.to(there[name].weight.device)
        except (QkError, RuntimeError) as error:
            raise QkError(f"{STAGE}: {path}: layer {name}: {error}") from error
    for name, table in manifest.tables.items():
        if id(there[name]) not in new:
            new[id(there[name])] = _table(path, name, table, manifest, tensors).to(there[name].weight.device)
    # deepcopy takes what its memo holds for an object: the float weights of integer layers are never copied.
    result = copy.deepcopy(model, dict(new))
    call_every_layer(result)
    for target in set(manifest.folds.values()) - manifest.layers.keys():  # a float layer takes up its norm's shift
        layer = result.get_submodule(target)
        if getattr(layer, "bias", None) is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(layer.weight.shape[0]), layer.weight.requires_grad)
    return result


def _table(
    path: Path, name: str, config: TableConfig, manifest: Manifest, tensors: dict[str, Tensor]
) -> QEmbedding | QEmbeddingBag:
    own = {key: tensors.get(manifest.tied.get(full, full)) for key in ("rows", "books") for full in [under(name, key)]}
    count = None if own["books"] is None else len(own["books"])
    for key, expected, got in (
        ("rows", config.rows, own["rows"] is not None and len(own["rows"])),
        ("books", config.books, count),
    ):
        if got != expected:
            raise fail(STAGE, f"{path}: {under(name, key)}", f"{expected} rows", got, ASK_AGAIN)
    try:
        return TABLES[config.kind][1](**own, **config.options())
    except (QkError, RuntimeError) as error:
        raise QkError(f"{STAGE}: {path}: table {name}: {error}") from error


def _fill(path: Path, manifest: Manifest, tensors: dict[str, Tensor], result: nn.Module) -> None:
    """Loads the state into `result`, of which every name, type and shape must be in the file, and nothing else."""
    state = result.state_dict()
    given = tensors | {name: tensors[stored] for name, stored in manifest.tied.items() if stored in tensors}
    advice = "Is the checkpoint of another model?"
    for name in sorted(state.keys() ^ given.keys()):
        expected, got = ("there", "nothing") if name in state else ("a tensor of the model", "one without a place")
        raise fail(STAGE, f"{path}: tensor {name}", expected, got, advice)
    for name, tensor in state.items():
        want, have = (tensor.dtype, list(tensor.shape)), (given[name].dtype, list(given[name].shape))
        if want != have:
            raise fail(STAGE, f"{path}: tensor {name}", f"{want[0]} {want[1]}", f"{have[0]} {have[1]}", advice)
    result.load_state_dict(given)
    # Tensors that the model ties but the checkpoint does not cannot both get their values.
    for name, tensor in result.state_dict().items():
        if not torch.equal(_raw(tensor.cpu()), _raw(given[name])):
            raise fail(STAGE, f"model: {name}", "free to hold its own values", "tied to another tensor", advice)


def _raw(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
