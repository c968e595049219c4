"""Training with LSQ: the loop around qk.methods.lsq, with a cosine, distillation, a score to keep the best by, resume.

Source: Esser et al., Learned Step Size Quantization (2020), section 3: SGD with momentum from the float checkpoint.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qk.calibrate.batches import call, unpadded
from qk.calibrate.objective import first_tensor, task_loss
from qk.errors import QkError, fail
from qk.inputs import KINDS, copied_to, describe, device_of, evaluating, feed, tensors_in
from qk.methods.lsq import param_groups, trainable
from qk.methods.training_file import Place, TrainingFile, random_state, set_random_state, set_values, values_of
from qk.prepare.insert import QuantLayer
from qk.prepare.lookup import QuantTable
from qk.prepare.prepared import Prepared, Unit, check_prepared
from qk.progress import Progress
from qk.spec import Recipe, checked_recipe

STAGE = "qk.tune"
MOMENTUM = 0.9
EPOCHS = {2: 90, 3: 90, 4: 90, 8: 1}  # by the narrowest width of weights, as LR (table 1 and section 3)
LR = {2: 0.01, 3: 0.01, 4: 0.01, 8: 0.001}
SLOWER = "A smaller tuning.lr may help."

Loss = Callable[[Any, Any], Tensor]
Score = Callable[[nn.Module], float]


def cosine(lr: float, done: float) -> float:
    """The learning rate when this share of training is done: from lr to 0, without a restart."""
    return 0.5 * lr * (1 + math.cos(math.pi * done))


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Mean over the batch. output: logits [batch, classes, ...], or what holds them."""
    return F.cross_entropy(first_tensor(output, STAGE), labels)


def soft_loss(output: Any, expected: Any, inputs: Any = None) -> Tensor:
    """KL(softmax(float output) || softmax(output)) at temperature 1, mean over the batch; see task_loss.
    inputs: that gave them, whose padding does not count."""
    found, expected = first_tensor(output, STAGE), first_tensor(expected, STAGE)
    return task_loss(found, expected, inputs) / len(found)


def feature_loss(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Mean over units of |output - float output|^2 / |float output|^2."""
    pairs = zip(found, expected, strict=True)
    errors = [(f - e).square().sum() / e.square().sum().clamp_min(1e-12) for f, e in pairs]
    return torch.stack(errors).mean()


def tune(
    p: Prepared,
    train: Iterable,
    recipe: Recipe | None = None,
    *,
    loss: Loss | None = None,
    validate: Score | None = None,
    folder: str | Path | None = None,
    every: int | None = None,
    progress: str = "auto",
) -> None:
    """Trains p's weights and steps on labelled data, in place; qk.convert(p) then gives the integer model.

    train: pairs (inputs, labels), read once in each epoch: a list, a DataLoader, or whatever has a length and can be
    iterated again. The random numbers of torch, numpy and Python are seeded for each epoch, and are the caller's again
    afterwards. recipe: `tuning` and `seed`.
    loss: of the model's output and the labels, the mean over the batch; by default cross entropy of the output's logits
    or first tensor. validate: model -> score, larger is better, called on the simulated integer model before training
    and after each epoch; the weights of the best score are kept. It should not see what the result is judged on.
    folder: a run that was killed goes on from there, to the same bits; another one's is refused. It is written after
    each epoch, and with `every` also after so many steps. progress: "auto", "bar", "lines" or "off".
    p.history[""] gets a record for each epoch, and a last one, with the first and last epoch's loss.
    Interrupted, p is left where training started: call again with the folder. Raises QkError for p that is not
    calibrated, data without labels or length, and a loss that is not finite.
    """
    check_prepared(p, STAGE)
    recipe = checked_recipe(recipe, STAGE)
    length = _length(train)
    for name, given in (("loss", loss), ("validate", validate)):
        if given is not None and not callable(given):
            raise fail(STAGE, name, "a function", type(given).__name__)
    if every is not None and every < 1:
        raise fail(STAGE, "every", "at least 1, or None", every)
    if recipe.tuning.patience is not None and validate is None:
        raise fail(STAGE, "validate", "a function of the model where tuning.patience waits for its score", "none")
    if torch.is_inference_mode_enabled():
        raise fail(STAGE, "the call", "outside torch.inference_mode", "inside it", "Learning needs gradients.")
    with _own_random_numbers(p.model), torch.enable_grad():
        _seed(recipe.seed, epoch=0)
        first = _pair(next(iter(train), None), 0)
        _check_sparse(p.model)
        trainable(p, recipe.tuning, first[0])
        run = _Run(p, train, length, recipe, loss or cross_entropy, validate)
        kept = None
        if folder is not None:
            more = {"batches in an epoch": length, "loss": _name(loss or cross_entropy), "validate": _name(validate)}
            kept = TrainingFile(folder, STAGE, p, recipe, first, more)
        start = values_of(p.model)
        try:
            with p.quantized(), Progress(progress, STAGE, run.epochs, run.epochs * length) as shown:
                run.train(kept, every, shown)
        except BaseException:
            set_values(p.model, start)
            raise


class _Run:
    """One training: the model, its optimizer, and how far it is."""

    def __init__(
        self, p: Prepared, data: Iterable, length: int, recipe: Recipe, loss: Loss, validate: Score | None
    ) -> None:
        tuning = recipe.tuning
        self.p, self.model, self.data, self.length, self.seed = p, p.model, data, length, recipe.seed
        self.loss, self.validate, self.patience = loss, validate, tuning.patience
        narrowest = min(layer.spec.weights for layer in p.quant_layers().values())
        self.epochs, self.lr = tuning.epochs or EPOCHS[narrowest], tuning.lr or LR[narrowest]
        self.optimizer = torch.optim.SGD(param_groups(p.model, tuning.weight_decay), lr=self.lr, momentum=MOMENTUM)
        self.max_norm = tuning.max_norm
        self.learns = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.units = p.units if tuning.distill == "features" else []
        self.teacher = None if tuning.distill == "none" else Teacher(p, self.units)
        self.place = Place()
        self.best: dict[str, Tensor] = {}

    def train(self, kept: TrainingFile | None, every: int | None, shown: Progress) -> None:
        """To the last epoch, or until patience ends. Leaves the best weights, or the last ones, in the model."""
        place = self.place
        if kept is not None and kept.found:
            self.best = kept.restore(place, self.model, self.optimizer)
        elif self.validate is not None:
            self._judge()
        shown.done, shown.iterations = place.epoch, place.epoch * self.length
        while place.epoch < self.epochs and not self._is_out_of_patience():
            shown.unit(f"epoch {place.epoch + 1}")
            loss = self._epoch(kept, every, shown)
            place.next_epoch()
            self._check_weights()
            record = {"iteration": place.epoch * self.length, "epoch": place.epoch, "loss": loss}
            if self.validate is not None:
                record["score"] = self._judge()
            place.records.append(record)
            if kept is not None:
                kept.write(place, self.model, self.optimizer, self.best)
            score = f", score {record['score']:.4g}" if "score" in record else ""
            shown.finish(self.length, f"loss {record['loss']:.4g}{score}")
        if self.best:
            set_values(self.model, self.best)
        first, last = place.records[0], place.records[-1]
        summary = {"before": first["loss"], "after": last["loss"], "kept": "learned"}
        if self.best:
            summary |= {"epoch": place.best_epoch, "score": place.best_score}
        self.p.history = {"": [*place.records, last | summary]}

    def _epoch(self, kept: TrainingFile | None, every: int | None, shown: Progress) -> float:
        """One pass over the data, or what is left of it; returns the mean loss of its steps."""
        place, done = self.place, self.place.step
        _seed(self.seed, place.epoch)
        with _training(self.model):
            for index, batch in enumerate(self.data):
                if index < done:  # a killed run trained on it
                    continue
                if index == self.length:
                    break
                if index == done and place.random:
                    set_random_state(place.random, device_of(self.model))
                loss = self._step(batch, index)
                place.step, place.total = index + 1, place.total + loss
                shown.at(place.step, loss)
                if kept is not None and every is not None and place.step % every == 0:
                    place.random = random_state(device_of(self.model))
                    kept.write(place, self.model, self.optimizer, self.best)
        return place.total / place.step

    def _step(self, batch: Any, index: int) -> float:
        """One step of the optimizer; returns the loss before it."""
        inputs, labels = _pair(batch, index)
        if isinstance(labels, Tensor) and not labels.numel():
            raise fail(STAGE, f"batch {index}", "with at least one sample", describe(labels), "Leave it out.")
        done = (self.place.epoch * self.length + index) / (self.epochs * self.length)
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.lr, done)
        with outputs_of_units(self.model, self.units) as features:
            output = call(self.p, inputs, index, STAGE)
        loss = self._loss(output, copied_to(labels, device_of(self.model)), index)
        if self.teacher is not None:
            loss = 0.5 * (loss + self.teacher.loss(output, features, inputs))
        value = loss.item()
        if not math.isfinite(value):
            raise fail(STAGE, f"the loss of batch {index} in epoch {self.place.epoch + 1}", "finite", value, SLOWER)
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(self.learns, self.max_norm))
            if not math.isfinite(norm):  # it would spoil everything that is scaled by it
                where = f"the gradient of batch {index} in epoch {self.place.epoch + 1}"
                raise fail(STAGE, where, "finite", norm, SLOWER)
        self.optimizer.step()
        return value

    def _loss(self, output: Any, labels: Any, index: int) -> Tensor:
        try:
            loss = self.loss(output, labels)
        except QkError:
            raise
        except Exception as error:
            got = f"{describe(labels)}, on which it raised {type(error).__name__}: {error}"
            raise fail(STAGE, f"the labels of batch {index}", "what loss takes", got) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = describe(loss) if not isinstance(loss, Tensor) or loss.requires_grad else "one without a gradient"
            raise fail(STAGE, "loss", "a function that returns one number with a gradient", what)
        return loss

    def _check_weights(self) -> None:
        """A NaN has a code like any other value, so that the loss does not tell."""
        spoilt = [name for name, tensor in self.model.named_parameters() if not torch.isfinite(tensor).all()]
        if spoilt:
            where = f"the weights after epoch {self.place.epoch}"
            raise fail(STAGE, where, "finite", f"NaN or infinity in {spoilt[0]}", SLOWER)

    @torch.no_grad()
    def _judge(self) -> float:
        """The score of the weights as they are; keeps them where it is the best so far."""
        with evaluating(self.model):
            found = self.validate(self.model)
        try:
            score = float(found)
        except (TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise fail(STAGE, "validate", "a function that returns a number", repr(found)[:80])
        if not self.best or score > self.place.best_score:
            self.best = values_of(self.model)
            self.place.best_score, self.place.best_epoch = score, self.place.epoch
        return score

    def _is_out_of_patience(self) -> bool:
        waited = self.place.epoch - self.place.best_epoch
        return bool(self.best) and self.patience is not None and waited >= self.patience


class Teacher:
    """The float model as it was when training began, in eval mode. units: whose outputs are matched too."""

    def __init__(self, p: Prepared, units: list[Unit]) -> None:
        self.model, self.units = copy.deepcopy(p.model).eval().requires_grad_(False), units
        for module in self.model.modules():
            if isinstance(module, QuantLayer | QuantTable):
                module.quantized = False

    @torch.no_grad()
    def loss(self, output: Any, features: list[Tensor], inputs: Any) -> Tensor:
        """How far the trained model's output, and those of its units, are from the teacher's on the same inputs."""
        with outputs_of_units(self.model, self.units) as expected_features:
            expected = feed(self.model, copied_to(inputs, device_of(self.model)))
        with torch.enable_grad():
            loss = soft_loss(output, expected, inputs)
            if not features:
                return loss
            ours, theirs = ([unpadded(inputs, x) for x in those] for those in (features, expected_features))
            return loss + feature_loss(ours, theirs)


@contextmanager
def outputs_of_units(model: nn.Module, units: list[Unit]) -> Iterator[list[Tensor]]:
    """Filled, while the block runs the model, with the units' outputs in the order in which they come."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(first_tensor(output, STAGE))

    handles = [unit.modules(model)[-1].register_forward_hook(see) for unit in units]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- state ------------------------------------------------------------------------------------------------------------


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode for a while."""
    with evaluating(model):  # which gives every module its mode back
        model.train()
        yield


@contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Whatever is seeded and drawn inside, the caller's random numbers go on as if nothing had been."""
    device = device_of(model)
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])


def _seed(seed: int, epoch: int) -> None:
    of_epoch = (seed * 1_000_003 + epoch) % 2**32
    torch.manual_seed(of_epoch)
    random.seed(of_epoch)
    np.random.seed(of_epoch)


def _name(function: Callable | None) -> str | None:
    """What can be told of a function in another process."""
    return function and getattr(function, "__qualname__", type(function).__qualname__)


# --- data -------------------------------------------------------------------------------------------------------------


def _check_sparse(model: nn.Module) -> None:
    """Raises QkError for float tables whose gradients are sparse: they are neither decayed nor measured."""
    tables = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    learns = [name for name in tables if any(p.requires_grad for p in model.get_submodule(name).parameters())]
    if learns:
        advice = "Set sparse=False, or quantize the tables: Recipe(embeddings=4)."
        raise fail(STAGE, "p", "without sparse gradients", f"nn.Embedding(sparse=True) in {', '.join(learns)}", advice)


def _length(train: Iterable) -> int:
    """How many batches an epoch has. Raises QkError for what cannot be read again and again."""
    advice = "Pass a list of (inputs, labels), or a DataLoader over a dataset with a length."
    if isinstance(train, (Tensor, str)) or not isinstance(train, Iterable) or isinstance(train, Iterator):
        raise fail(STAGE, "train", "pairs that can be read in every epoch", type(train).__name__, advice)
    try:
        length = len(train)  # type: ignore[arg-type]
    except TypeError as error:
        raise fail(STAGE, "train", "of a known length", f"{type(train).__name__}: {error}", advice) from error
    if length == 0:
        raise fail(STAGE, "train", "at least one batch", "none")
    return length


def _pair(batch: Any, index: int) -> tuple[Any, Any]:
    """Inputs and labels of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], KINDS):
        raise fail(STAGE, f"batch {index} of train", "a pair (inputs, labels)", describe(batch))
    if not all(torch.isfinite(x).all() for x in tensors_in(batch[0])):
        raise fail(STAGE, f"the inputs of batch {index}", "finite", "NaN or infinity")
    return batch[0], batch[1]
