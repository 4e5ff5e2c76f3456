"""What `sparsify` measures of a trained model.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.run_config import RunConfig, RuntimeConfig
from foreshock.proxy.data import batches as tokens_of
from foreshock.proxy.data.prepare import TokenData
from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE
from foreshock.sparsity import Greedy, Sparsified, sparsify
from foreshock.sparsity.macs import macs_of
from foreshock.sparsity.rotation import rotate
from foreshock.tasks._languages import device_of, losses
from foreshock.tasks._schemes import SCHEMES, SHARES, Scheme
from foreshock.training.panel import Row
from foreshock.training.setup import build_training

FEW = 8
"""Tokens that the model reads on which schemes are tried."""
STEP = 0.25
"""Step of greedy allocation: coarse, as every step costs passes of all blocks."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What schemes are measured on."""

    calibration_BT: Tensor
    """Training sequences, without targets."""
    held_out_BT: Tensor
    """Held-out sequences, with the token after each as the last target."""


def examined(model: nn.Module, data: TokenData, config: RunConfig, schemes: Sequence[str], sequences: int) -> Row:
    """The rows of `Sparsify`."""
    given = _data(data, config, sequences, device_of(model))
    rows: Row = {"sparsify/loss/dense": float(losses(model, given.held_out_BT).mean())}
    for name in schemes:
        for share in SHARES:
            rows |= _measured(model, f"{name}_{round(100 * share)}", SCHEMES[name], share, given)
    return rows


def check(config: RunConfig, schemes: Sequence[str]) -> None:
    """Put every scheme on the model as it would be trained, once.

    Raises:
        UserError: a scheme that this model has no place for.
    """
    config = replace(config, runtime=RuntimeConfig(), record=replace(config.record, monitors=()))
    model = build_training(config, VOCAB_SIZE).model
    ids_BT = torch.arange(min(FEW, config.data.seq_len))[None]
    for name in schemes:
        # What is calibrated has its place where the others have.
        scheme = SCHEMES[name]
        tried = Scheme(method=scheme.method, rotated=scheme.rotated or scheme.equal, mlp=scheme.mlp)
        with ExitStack() as stack:
            _put_on(stack, model, tried, 0.5, ids_BT)


def _data(data: TokenData, config: RunConfig, sequences: int, device: torch.device) -> _Data:
    shape = {"seq_len": config.data.seq_len, "batch_size": config.data.batch_size}
    steps = range(1, 1 + -(-sequences // config.data.batch_size))
    seen = [tokens_of.train_batch(data.train_tokens, step, seed=0, **shape) for step in steps]
    held_out = tokens_of.held_out_batches(data.held_out_tokens, count=config.train.eval_batches, **shape)
    seen_BT, held_out_BT = (torch.cat([torch.from_numpy(ids) for ids in each]).to(device) for each in (seen, held_out))
    return _Data(calibration_BT=seen_BT[:sequences, :-1], held_out_BT=held_out_BT)


def _measured(model: nn.Module, name: str, scheme: Scheme, share: float, given: _Data) -> Row:
    with ExitStack() as stack:
        handle, added = _put_on(stack, model, scheme, share, given.calibration_BT)
        counted = macs_of(model, handle.sparsities, rotations=added)
        return {
            f"sparsify/loss/{name}": float(losses(model, given.held_out_BT).mean()),
            f"sparsify/error/{name}": fmean(handle.error(given.held_out_BT[: len(given.calibration_BT), :-1]).values()),
            f"sparsify/dropped/{name}": fmean(handle.measured().values()),
            f"sparsify/macs/{name}": counted.total / counted.dense,
        }


def _put_on(
    stack: ExitStack, model: nn.Module, scheme: Scheme, share: float, calibration_BT: Tensor
) -> tuple[Sparsified, int]:
    """The masks of a scheme, and what its rotations add in multiply-accumulates a token."""
    added = stack.enter_context(rotate(model, calibration_BT)).macs if scheme.rotated else 0
    options: dict[str, Any] = {}
    if scheme.calibrated or scheme.greedy:
        options["calibration"] = calibration_BT
    if scheme.greedy:
        options["allocation"] = Greedy(step=STEP)
    if scheme.mlp:
        options["modules"] = _spared_by_cats(model)
    if scheme.equal:
        share = max(0.0, share - _cost_of_rotations(model, calibration_BT))
    return stack.enter_context(sparsify(model, scheme.method, share, **options)), added


def _spared_by_cats(model: nn.Module) -> list[str]:
    with sparsify(model, "cats") as handle:
        return list(handle.sparsities)


def _cost_of_rotations(model: nn.Module, ids_BT: Tensor) -> float:
    """As a share of the linears of all blocks."""
    with rotate(model, ids_BT) as rotated:
        return rotated.macs / macs_of(model, {}).linears
