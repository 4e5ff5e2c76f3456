"""Configs: strict in, canonical out; arms and run ids that say exactly what differs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core import plugins
from foreshock.core.arms import Arm, arm_name, interventions_name
from foreshock.core.config import Spec, canonical_json, format_value, from_json, parse_value, replace_at, to_json
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import OptimConfig, RunConfig, edited, resolve, run_id


def test_round_trip() -> None:
    """A config survives JSON, and resolving is idempotent."""
    config = resolve(RunConfig())
    assert from_json(RunConfig, to_json(config)) == config
    assert resolve(config) == config
    assert resolve(Arm.parse("qk_norm+z_loss:weight=1e-3").apply(config)).interventions[1].options == {"weight": 1e-3}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.learning_rate", 1.0, "unknown field 'optim.learning_rate'; Known: optim.beta1, .*optim.lr,"),
        ("optim.weightdecay", 1.0, "did you mean 'optim.weight_decay'"),
        ("optm.lr", 1.0, "did you mean 'optim'"),
        ("optim.lr", 0.0, r"optim.lr must be a finite number above 0, got 0.0"),
        ("optim.lr", float("nan"), "optim.lr must be a finite number above 0"),
        ("optim.lr", float("inf"), "optim.lr must be a finite number above 0"),
        ("optim.lr", "fast", "optim.lr must be of type float, got 'fast'"),
        ("optim.lr", True, "optim.lr must be of type float, got True"),
        ("train.steps", 2.5, "train.steps must be of type int"),
        ("train.steps", 0, "train.steps must be at least 1"),
        ("model.heads", 3, "model.width must be a multiple of model.heads=3, got 64"),
        ("model.heads", 64, "model.width must give an even head dimension for RoPE"),
        ("schedule.warmup", 1.5, "warm-up cannot be longer than training"),
        ("schedule.name", "cosin", "unknown value for schedule.name 'cosin'; did you mean 'cosine'"),
        ("model.mlp", "swigul", "unknown mlp 'swigul'; did you mean 'swiglu'"),
        ("model.mlp", "gelu:expanson=2", "unknown option of gelu 'expanson'; did you mean 'expansion'"),
        ("interventions", ["qknorm"], "unknown intervention 'qknorm'; did you mean 'qk_norm'"),
        ("interventions", ["qk_norm", "qk_norm"], "must name each intervention once"),
        ("interventions", ["no_such_package.module:Class"], "cannot load intervention.* PYTHONPATH"),
        ("interventions", [":Class"], "cannot load intervention"),
        ("interventions", ["foreshock.core.config:Spec"], "must be a frozen dataclass derived from Intervention"),
        ("interventions", ["foreshock.proxy.layers.norms.rms_norm:RmsNorm"], "derived from Intervention to be"),
        ("record.monitors", ["foreshock.interventions.z_loss:ZLoss"], "derived from Monitor to be a monitor"),
        ("record.monitors", ["los"], "unknown monitor 'los'; did you mean 'loss'"),
        ("data.seq_len", 1, "data.seq_len must be at least 2"),
    ],
)
def test_bad_values_name_field_and_fix(path: str, value: object, message: str) -> None:
    """Every wrong value is an error that names the field, and the nearest name where one is known."""
    with pytest.raises(ConfigError, match=message):
        resolve(replace_at(RunConfig(), path, value))


def test_unknown_key_in_json() -> None:
    """A key that is not a field is an error, at any depth."""
    with pytest.raises(ConfigError, match=r"unknown field 'optim.lrr'; did you mean 'optim.lr'"):
        from_json(RunConfig, {"optim": {"lrr": 1.0}})


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9) | st.booleans())
def test_values_survive_the_command_line(value: float) -> None:
    """`parse_value` reads back what `format_value` wrote."""
    assert parse_value(format_value(value)) == value


def test_equal_configs_have_equal_text() -> None:
    """Integer and float spellings of the same number are one config once resolved."""
    one, other = RunConfig(optim=OptimConfig(lr=1)), RunConfig(optim=OptimConfig(lr=1.0))
    assert canonical_json(resolve(one)) == canonical_json(resolve(other))
    assert run_id(one, "data") == run_id(other, "data")


@pytest.mark.parametrize(
    "path_value", [("optim.lr", 0.5), ("train.seed", 1), ("runtime.threads", 2), ("model.mlp", "swiglu")]
)
def test_run_id_changes_with_the_bits(path_value: tuple[str, object]) -> None:
    """Whatever may change the bits changes the id; what is only recorded does not."""
    base = RunConfig()
    assert run_id(replace_at(base, *path_value), "data") != run_id(base, "data")
    assert run_id(base, "other data") != run_id(base, "data")
    recorded = replace(base, record=replace(base.record, log_every=3, monitors=()))
    assert run_id(recorded, "data") == run_id(base, "data")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("none", "none"),
        ("qk_norm", "qk_norm"),
        ("z_loss+qk-norm", "qk_norm+z_loss"),
        ("z_loss:weight=1e-4", "z_loss"),
        ("z_loss:weight=1e-3", "z_loss:weight=0.001"),
        ("qk_norm+optim.weight_decay=0", "qk_norm+optim.weight_decay=0"),
        ("optim.weight_decay=1e-4", "none"),
        ("model.mlp=swiglu", "model.mlp=swiglu"),
        ("model.mlp=gelu:expansion=2", "model.mlp=gelu:expansion=2"),
        ("z_loss:weight=1e+1+optim.eps=1e-15", "z_loss:weight=10+optim.eps=1e-15"),
    ],
)
def test_arm_names_are_canonical(text: str, name: str) -> None:
    """Defaults are dropped, parts are sorted, an override at the base value is the base arm."""
    base = resolve(RunConfig())
    config = resolve(Arm.parse(text).apply(base))
    assert arm_name(config, base) == name
    assert interventions_name(config) == ("+".join(p for p in name.split("+") if "." not in p.split("=")[0]) or "none")


def test_axes_are_not_part_of_an_arm() -> None:
    """Size, learning rate and seed never appear in an arm's name."""
    base = resolve(RunConfig())
    config = replace_at(replace_at(replace_at(base, "optim.lr", 0.3), "train.seed", 4), "model.width", 96)
    assert arm_name(config, base) == "none"


def test_a_cure_that_is_a_setting_edits_the_config_only_when_built() -> None:
    """The stored config keeps the intervention; the edited one has the setting."""
    config = resolve(Arm.parse("qk_norm").apply(RunConfig()))
    assert config.model.norms.q is None
    assert edited(config).model.norms.q == Spec("layer_norm")


def test_resolving_needs_no_torch() -> None:
    """Any config with any plug-in resolves in a process that has no torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from foreshock.core import plugins; from foreshock.core.config import Spec\n"
        "families = ['interventions', 'monitors', 'proxy.data.sources', 'proxy.data.tokenizers']\n"
        "families += [f'proxy.layers.{f}' for f in ('norms', 'mlps', 'scores', 'probabilities', 'residuals')]\n"
        "for family in families:\n"
        "    for name in plugins.names(family): plugins.declaration(family, name)\n"
        "from foreshock.core.run_config import RunConfig, resolve; resolve(RunConfig())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_users_own_plugin_loads_by_module_and_class() -> None:
    """`package.module:Class` needs no registration."""
    spec = Spec.parse("foreshock.interventions.z_loss:ZLoss:weight=0.5")
    assert plugins.load("interventions", spec).weight == 0.5


OWN_PLUGIN = """
from dataclasses import dataclass
from foreshock.core.contracts import Intervention

@dataclass(frozen=True, kw_only=True)
class Own(Intervention):
    factor: float = 1.0
    # {comment}
"""


def test_run_id_changes_with_the_source_of_a_users_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own code has no semantics version, so its source counts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(RunConfig(), interventions=(Spec.parse("own_plugin:Own:factor=2"),))
    ids = []
    for comment in ("one", "two", "one"):
        (tmp_path / "own_plugin.py").write_text(OWN_PLUGIN.format(comment=comment))
        ids.append(run_id(config, "data"))
    assert ids[0] == ids[2] != ids[1]


def test_a_record_is_named_without_the_users_code() -> None:
    """Where a user's plug-in cannot be imported, its arm keeps the name it was recorded with."""
    config = replace(resolve(RunConfig()), interventions=(Spec("absent_module:Own", {"factor": 2.0}),))
    assert arm_name(config, resolve(RunConfig())) == "absent_module:Own:factor=2"
