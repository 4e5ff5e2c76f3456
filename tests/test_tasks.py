"""What runs do: every task keeps its contract; images and conditioned models learn what was planted."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core import plugins
from foreshock.core.config import Spec, to_json
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig, bits_of, resolve, run_id
from foreshock.core.run_folder import RunFolder
from foreshock.hypernetworks import Design
from foreshock.images.data import image_data
from foreshock.study.plan import check_tasks
from foreshock.tasks import _preferences as preferences
from foreshock.tasks._conditioned import LEVELS, conditioned, digit_batches, token_batches
from foreshock.tasks.classify import batches_of
from foreshock.tasks.condition import Condition
from foreshock.testing import check_task
from foreshock.training.loss import predict
from tests.conftest import tiny_config

QUICK = {
    "search": 'search:architectures=["resnet_digits","proxy"],train_steps=4,quality_steps=2,attack_steps=2,initial=2',
    "steer": 'steer:on=digits,schemes=["mean_act_norms"],fit_steps=1',
    "sparsify": 'sparsify:schemes=["wina_equal","teal_rotated","wina_threshold","teal_greedy"],sequences=2',
}
"""What is tried of tasks whose defaults take long."""


@pytest.mark.parametrize("name", plugins.names("tasks"))
def test_task(name: str) -> None:
    check_task(QUICK.get(name, name))


# What a task's run is called


def test_the_usual_task_is_named_as_before_tasks_had_options() -> None:
    """Runs that were made then are still found."""
    assert bits_of(RunConfig())["task"] == "train"
    assert bits_of(resolve(replace(RunConfig(), task=Spec("train"))))["task"] == "train"


def test_options_of_a_task_are_part_of_the_id_and_defaults_are_filled_in() -> None:
    plain, named, other = (
        resolve(tiny_config(f"task={task}"))
        for task in ("classify", "classify:layer=batch_norm_relu", "classify:layer=evonorm_s0")
    )
    assert run_id(plain, "0") == run_id(named, "0") != run_id(other, "0")


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("task=clasify", "did you mean 'classify'"),
        ("task=classify:layer=evonorm_s9", "did you mean 'evonorm_s"),
        ("task=classify:network=resnets", "did you mean 'resnet'"),
        ("task=classify:layr=evonorm_s0", "did you mean 'layer'"),
        ("task=classify+model.depth=1", "depth must be at least 2"),
        ("task=classify+model.norms.q=rms_norm", r"model.norms.q is a setting of foreshock's own proxy"),
        ("task=classify+rezero", "rezero is a setting that foreshock builds its proxy by"),
        ("task=classify+model.build=nano:build", "cannot be trained by task classify"),
        ("task=classify+data.batch_size=5000", "data.batch_size must be from 1"),
        ("task=classify+qk_norm", "ImageNetwork has no attention that can be changed"),
        ("task=classify+record.monitors=[loss,linear_norms,attention_logits]", "attention"),
        ("task=condition+sigma_reparam", "task condition cannot be trained with sigma_reparam"),
        ("task=condition:network=proxy+record.monitors=[block_outputs]", "block_outputs"),
        ("task=condition:network=proxy+qk_lr", "model.roles must have lr and decay 1"),
        ("task=attack+z_loss", "interventions play no part in task attack"),
        ("task=search+z_loss", "interventions play no part in task search"),
        ("task=attack+runtime.precision=bf16", "runtime.precision must be fp32 in task attack"),
        ("task=condition:inputs=0", "condition:inputs must be from 1 to 39"),
        ("task=condition:encoding=cos_sine", "did you mean 'cos_sin'"),
        ("task=condition:hidden=[0]", "hidden must be"),
    ],
)
def test_what_cannot_work_is_refused_while_planning(arm: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_tasks([tiny_config(f"{arm}" if "depth" in arm else f"{arm}+model.depth=2")])


@pytest.mark.parametrize("arm", ["qk_norm", "soft_cap", "model.norms.q=rms_norm"])
def test_settings_of_the_proxy_reach_a_conditioned_proxy(arm: str) -> None:
    plain, other = (tiny_config(f"task=condition:network=proxy+{part}") for part in ("none", arm))
    packed = torch.cat([torch.full((2, 1), LEVELS // 2), torch.arange(32).view(2, 16) % 23], dim=1)
    ours, theirs = (Condition(network="proxy")._build(config, 23)(packed) for config in (plain, other))
    assert not torch.allclose(ours, theirs)


def test_default_monitors_that_cannot_look_into_a_conditioned_proxy_are_left_out(tmp_path: Path) -> None:
    config = tiny_config("task=condition:network=proxy")
    check_tasks([config])
    folder = RunFolder(tmp_path / "run")
    folder.create(to_json(config))
    try:
        assert Condition(network="proxy").run(config, folder, lambda: False) == "done"
    finally:
        torch.set_flush_denormal(False)
    stopped = {event["monitor"] for event in folder.events() if event["event"] == "monitor_stopped"}
    assert stopped >= {"attention_logits", "block_outputs"}
    assert any("norms/grad_norm" in row for row in folder.metrics())


# Pairs of inputs and classes


def test_the_loss_of_pairs_is_plain_cross_entropy() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 3, 3, 1])
    info = predict(lambda inputs: logits, (torch.zeros(5, 2), targets), RunConfig().runtime)
    assert torch.equal(info.loss, F.cross_entropy(logits, targets))
    assert isinstance(info.batch, tuple)


def test_batches_of_images_are_those_of_the_data() -> None:
    config, data = tiny_config("task=classify"), image_data("digits")
    batches = batches_of(data, config)
    (images, labels), again = batches.at(3), batches.at(3)
    assert images.shape == (4, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip((images, labels), again, strict=True))
    for image, label in zip(images.numpy(), labels.numpy(), strict=True):
        same = (data.train_images == image).all(axis=(1, 2, 3))
        assert label in data.train_labels[same]


# Labelings weighted by hyper-inputs


@given(inputs=st.integers(1, 9), step=st.integers(1, 1 << 33), seed=st.integers(0, 1 << 40))
def test_hyper_inputs_and_labels_are_pure_functions_inside_their_range(inputs: int, step: int, seed: int) -> None:
    gamma, again = (preferences.hyper_inputs(6, inputs, step=step, seed=seed) for _ in range(2))
    assert np.array_equal(gamma, again)
    assert ((gamma >= 0) & (gamma < 1)).all()
    labelings = preferences.of_classes(np.arange(6), inputs, 10)
    labels = preferences.labelled(labelings, gamma, step=step, seed=seed)
    assert all(label in column for label, column in zip(labels, labelings.T, strict=True))


def test_labelings_are_drawn_as_often_as_gamma_says() -> None:
    """Share of labeling i: γ_i / D, the true one the rest; four standard errors of a binomial share."""
    draws, gamma = 40_000, np.array([0.9, 0.0, 0.3])
    labelings = np.broadcast_to(np.arange(4)[:, None], (4, draws))
    labels = preferences.labelled(labelings, np.tile(gamma, (draws, 1)), step=1, seed=0)
    expected = np.array([1 - gamma.mean(), *gamma / 3])
    shares = np.bincount(labels, minlength=4) / draws
    assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()
    assert shares[2] == 0


def test_labelings_of_classes_all_differ() -> None:
    every = preferences.of_classes(np.arange(10), 39, 10)
    assert len({tuple(labeling) for labeling in every}) == 40
    assert all(sorted(labeling) == list(range(10)) for labeling in every)
    assert every[0].tolist() == list(range(10))


def test_labelings_of_tokens_look_back() -> None:
    tokens = np.array([[5, 6, 7, 8]])
    assert preferences.of_tokens(tokens, 3)[:, 0].tolist() == [[6, 7, 8], [5, 6, 7], [5, 5, 6], [5, 5, 5]]


def test_inputs_begin_with_the_gamma_that_labels_follow() -> None:
    """With γ = 0 in front of the model nothing but the true labels would remain: here they are counted by γ."""
    config, data = tiny_config("task=condition+data.batch_size=256"), image_data("digits")
    truth = {image.tobytes(): label for image, label in zip(data.train_images, data.train_labels, strict=True)}
    chosen, gammas = [], []
    for step in range(1, 6):
        inputs, targets = digit_batches(data, config, 2).at(step)
        gammas.append(inputs[:, :2].double().numpy() / LEVELS)
        true = np.array([truth[row.tobytes()] for row in inputs[:, 2:].reshape(-1, 1, 8, 8).numpy()])
        chosen.append((targets.numpy() - true) % 10)
    chosen, gamma = np.concatenate(chosen), np.concatenate(gammas)
    assert set(chosen.tolist()) == {0, 1, 2}
    for labeling in (1, 2):
        p = gamma[:, labeling - 1] / 2
        excess = ((chosen == labeling) - p).sum() / math.sqrt((p * (1 - p)).sum())
        assert abs(excess) < 4


def test_evaluations_draw_other_hyper_inputs_than_training() -> None:
    from foreshock.proxy.data.prepare import prepare

    config = tiny_config("task=condition:network=proxy")
    batches = token_batches(prepare(config.data, config.train), config, 2)
    (trained, _), (held_out, _) = batches.at(1), batches.held_out[0]
    assert trained.shape == held_out.shape == (4, 2 + 16)
    assert not torch.equal(trained[:, :2], held_out[:, :2])


def test_each_example_is_answered_under_its_own_gamma() -> None:
    """A batch equals its examples one by one, for the perceptron and for the proxy."""
    for network, classes in (("mlp", 10), ("proxy", 23)):
        config = tiny_config(f"task=condition:network={network},inputs=2")
        model = conditioned(config, network, 2, Design(), classes)
        generator = torch.Generator().manual_seed(0)
        gamma = torch.randint(LEVELS, (3, 2), generator=generator)
        rest = torch.randn(3, 64, generator=generator) if network == "mlp" else torch.randint(23, (3, 16))
        packed = torch.cat([gamma.to(rest.dtype), rest], dim=1)
        whole = model(packed)
        apart = torch.cat([model.wrapped(row[:2].float() / LEVELS, row[None, 2:]) for row in packed])
        # Sums of at most some hundred products in another order, of numbers of the size of the logits.
        assert torch.allclose(whole, apart, rtol=0, atol=1e-4 * float(apart.detach().abs().max()))
