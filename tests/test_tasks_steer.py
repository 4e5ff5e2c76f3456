"""The task `steer`: what it refuses, what it measures against a slow reference, and that a run can be interrupted."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from foreshock import steer
from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, TrainConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.sources import languages
from foreshock.tasks import _steered
from foreshock.tasks._steered import distance, fitted, sites_of
from foreshock.tasks.steer import GAMMAS, SCHEMES, Steer
from foreshock.testing import check_task
from foreshock.training.setup import build_model
from tests.conftest import tiny_config

TINY = RunConfig(
    task=Spec("steer", {"schemes": ["mean_act_mlp", "lineas_proj"], "fit_steps": 2}),
    model=ModelConfig(width=16, depth=1, heads=1),
    data=DataConfig(source=Spec("languages"), seq_len=104, batch_size=2),
    train=TrainConfig(steps=3, eval_every=3, eval_batches=1),
    record=RecordConfig(monitors=(Spec("loss"),), log_every=3, checkpoint_every=1),
)


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "LENGTH", 100_000)


@pytest.mark.slow
def test_digits_keep_the_contract_of_tasks() -> None:
    check_task('steer:on=digits,schemes=["mean_act_norms"],fit_steps=1')


def run(config: RunConfig, path: Path, stops: int) -> list[dict[str, float]]:
    """The rows of a run that is interrupted after each of so many steps."""
    from foreshock.core import plugins
    from foreshock.core.config import to_json

    task, folder, left = plugins.load("tasks", config.task), RunFolder(path), [stops]
    folder.create(to_json(config))

    def stop() -> bool:
        left[0] -= 1
        return left[0] >= 0

    while task.run(config, folder, stop) == "interrupted":
        folder.close()
    torch.set_flush_denormal(False)
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds", "monitors"))}
        for row in folder.metrics()
    ]


@pytest.mark.slow
def test_a_run_on_languages_that_is_interrupted_ends_the_same(tmp_path: Path) -> None:
    """All rows to the bit; the last one holds every quantity of every scheme."""
    config = resolve(TINY)
    whole, parts = run(config, tmp_path / "whole", 0), run(config, tmp_path / "parts", 2)
    assert whole == parts
    told = {key for key in whole[-1] if key.startswith("steer/")}
    measured = ("share", "turned", "loss_source", "loss_target", "loss_written")
    expected = {f"steer/{q}/{s}" for q in measured for s in ("none", "mean_act_mlp", "lineas_proj")}
    expected |= {f"steer/{q}/{s}" for q in ("distance", "support") for s in ("mean_act_mlp", "lineas_proj")}
    assert told == expected | {"steer/judge_accuracy"}
    assert whole[-1]["steer/judge_accuracy"] > 0.95
    assert whole[-1]["steer/loss_source/none"] != whole[-1]["steer/loss_source/mean_act_mlp"]


# --- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "language"}, "did you mean 'languages'"),
        ({"schemes": ("mean_act_mpl",)}, "did you mean 'mean_act_mlp'"),
        ({"on": "digits", "schemes": ("mean_act_proj",)}, "unknown scheme 'mean_act_proj'"),
        ({"fit_steps": 0}, "steer:fit_steps must be at least 1"),
        ({"fit_lr": 0.0}, "steer:fit_lr must be above 0"),
        ({"samples": 3}, "steer:samples must be at least 4"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Steer(**options)  # type: ignore[arg-type]


def test_what_plays_no_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.source must be languages for task steer:on=languages"):
        Steer().check(tiny_config())
    with pytest.raises(ConfigError, match=r"data\.source must be languages"):
        Steer().data(tiny_config())
    with pytest.raises(ConfigError, match=r"data\.seq_len must be at least 104"):
        Steer().check(replace(TINY, data=replace(TINY.data, seq_len=64)))
    with pytest.raises(UserError, match="interventions play no part in task"):
        Steer(on="digits").check(replace(tiny_config(), interventions=(Spec("z_loss"),)))


# --- what it measures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["linear_act_norms", "aura_proj", "iti_mlp", f"lineas_mlp_gamma_{GAMMAS[0]:g}"])
def test_a_scheme_puts_its_method_at_its_sites(scheme: str) -> None:
    model = build_model(TINY, 20)
    ids_NT = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))
    steering = fitted(model, ids_NT[:4], ids_NT[4:], sites_of(model, scheme), scheme, Steer(fit_steps=1))
    steering.remove()
    wanted = {
        "mlp": ["blocks.0.pre_mlp_norm"],
        "norms": ["blocks.0.pre_attn_norm", "blocks.0.pre_mlp_norm", "final_norm"],
        "proj": ["blocks.0.attn.proj"],
    }
    assert list(steering.maps) == wanted[re.findall("mlp|norms|proj", scheme)[0]]
    assert steering.strength == 1.0
    shifts = all(bool((own.omega_D == 1).all()) for own in steering.maps.values())
    assert shifts is scheme.startswith("iti")


def test_strengths_of_iti() -> None:
    model = build_model(TINY, 20)
    ids_NT = torch.arange(48).reshape(8, 6) % 20
    for scheme, strength in (("iti_strong_mlp", 4.0), ("iti_proj", 0.5), ("iti_norms", 1.0)):
        steering = fitted(model, ids_NT[:4], ids_NT[4:], sites_of(model, scheme), scheme, Steer())
        steering.remove()
        assert steering.strength == strength


def test_every_scheme_is_of_a_known_form() -> None:
    for schemes in SCHEMES.values():
        assert len(set(schemes)) == len(schemes)
        for scheme in schemes:
            name, where, gamma = _steered._parts(scheme)
            assert scheme.startswith(f"{name}_{where}")
            assert (gamma > 0) is ("gamma" in scheme)


@torch.no_grad()
def test_the_distance_is_that_of_sorted_means_over_places() -> None:
    """By loops: at equal numbers W₁ of a channel is the mean of |differences| of sorted values."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.LayerNorm(4))
    source, target = (torch.randn(7, 6, 3, generator=generator) + shift for shift in (0, 1))
    with steer.fit(model, source, target, sites=["1", "3"], method="mean_act") as steering:
        got = distance(model, steering, source, target, model)
        mapped = model(source).mean(1)
        assert steering.attached

    def apart(a: Tensor, b: Tensor) -> float:
        pairs = zip(a.T, b.T, strict=True)
        return sum(float((x.sort().values - y.sort().values).abs().mean()) for x, y in pairs) / a.shape[1]

    first, aim = (model[:2](given).mean(1) for given in (source, target))
    last, wanted = (model(given).mean(1) for given in (source, target))
    moved = first + steering.maps["1"].b_D
    expected = (apart(moved, aim) + apart(mapped, wanted)) / (apart(first, aim) + apart(last, wanted))
    assert got == pytest.approx(expected, rel=1e-4)  # single precision, summed in another order


# --- the example ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_steers_a_local_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from examples.steer_huggingface import steered
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<e>", "the", "sun", "rain", "is", "warm", "cold", "today", "very", "not"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<e>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", unk_token="<e>").save_pretrained(
        tmp_path
    )
    config = transformers.GPT2Config(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=80, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "source.txt").write_text("the sun is warm\nthe sun is very warm today\n" * 8)
    (tmp_path / "target.txt").write_text("the rain is cold\nthe rain is not warm\n" * 8)
    arguments = (str(tmp_path), tmp_path / "source.txt", tmp_path / "target.txt", "the sun")
    plain, changed = steered(*arguments, method="linear_act")
    assert "Steering(2 sites" in capsys.readouterr().out
    assert plain.startswith("the sun")
    assert changed.startswith("the sun")
    assert steered(*arguments, method="linear_act") == (plain, changed)
