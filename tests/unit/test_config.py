"""Configs: precedence, recipes, and one clear line for every mistake."""

from __future__ import annotations

import pytest

from polyrank.config import Config, load_config, make_config, merge
from polyrank.data.partition import Dirichlet, Iid
from polyrank.errors import InputError
from polyrank.recipes import recipes


def test_the_quick_start_is_the_default():
    config = load_config()
    assert config == Config()
    assert config.data.source == "docstrings"
    assert config.partition == Dirichlet()


def test_settings_lie_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('rounds = 9\n[adapter]\nform = "svd"\nrank = 5\n[partition]\nkind = "iid"\n')
    config = load_config(path, ["rounds=11", "partition.clients=3", "data.source=my file.csv"])
    assert (config.rounds, config.adapter.form, config.adapter.rank) == (11, "svd", 5)
    assert config.partition == Iid(clients=3)
    assert config.data.source == "my file.csv"


def test_another_kind_replaces_the_whole_table():
    assert merge({"p": {"kind": "a", "x": 1}}, {"p": {"kind": "b"}}) == {"p": {"kind": "b"}}
    assert merge({"p": {"kind": "a", "x": 1}}, {"p": {"x": 2}}) == {"p": {"kind": "a", "x": 2}}


def test_a_dumped_config_loads_again():
    config = load_config(None, ["partition.kind=natural", "partition.column=site", "training.local_steps=3"])
    assert make_config(config.model_dump(mode="json")) == config


def test_every_recipe_gives_a_config():
    assert "fedit" in recipes()
    for name in recipes():
        assert make_config({"method": name}).method == name


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("roundz=3", r"roundz = 3: unknown key; did you mean 'rounds'\? one of: method, seed, rounds"),
        ("training.learning_rat=1", "training.learning_rat = 1: unknown key; did you mean 'learning_rate'"),
        ("partition.alhpa=1", "partition.alhpa = 1: unknown key; did you mean 'alpha'"),
        ("rounds=many", "rounds = 'many': must be a valid integer"),
        ("rounds=0", "rounds = 0: must be greater than or equal to 1"),
        ("training.learning_rate=-1", "training.learning_rate = -1: .*greater than 0"),
        ("training.learning_rate=nan", "training.learning_rate = nan: .*finite"),
        ("training.optimizer=adam", "training.optimizer = 'adam': must be 'adamw' or 'sgd'"),
        ("partition.kind=dirichlett", "partition.kind = 'dirichlett': did you mean 'dirichlet'"),
        ("sampling.count=0", "sampling.count = 0: .*greater than or equal to 1"),
        ("method=fedprox", "method = 'fedprox': .*one of: .*fedit"),
        ("device=tpu", "device = 'tpu': must be 'auto', 'cpu', 'cuda' or 'mps'"),
        ("adapter.targets=4", "adapter.targets = 4: "),
        ("allocation.rank=9", "allocation.rank = 9: at most adapter.rank, 8"),
        ("allocation.kind=[1]", "allocation.kind = .*one of"),
        ("adapter.targets=[]", "adapter.targets = ..: name at least one linear map"),
        ("training.prune_keep=0.5", "aggregation.kind = 'fedavg': needs equal ranks"),
        ("training.prune_penalty=0.5", "training.prune_penalty = 0.5: needs prune_keep"),
        (
            "training={sparse_rounds=2, factors='B'}",
            "training.sparse_rounds = 2: needs adapter.form = 'lora', .* training.factors = 'both'",
        ),
        ("allocation={kind='loss_based', high_rank=8}", "aggregation.kind = 'fedavg': needs equal ranks"),
        (
            "allocation={kind='loss_based', low_rank=9, high_rank=4}",
            "allocation.low_rank = 9: at most adapter.rank, 8",
        ),
        ("training.orthogonality=0.1", "training.orthogonality = 0.1: needs adapter.form = 'svd'"),
        ("rounds", "--set = 'rounds': must look like key=value"),
        ("data=3", "data = 3: must be a table of keys"),
        ("partition.kind=natural", "partition.column = None: must be given"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_choices(setting, line):
    with pytest.raises(InputError, match=line) as caught:
        load_config(None, [setting])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(line.split(" = ")[0])


@pytest.mark.parametrize(("method", "rule"), [("fedit", "fedavg"), ("fedex", "residual")])
def test_a_rule_for_equal_ranks_is_named(method, rule):
    given = [f"method={method}", "allocation.kind=loss_based", "allocation.high_rank=8"]
    with pytest.raises(InputError, match=f"aggregation.kind = '{rule}': needs equal ranks"):
        load_config(None, given)


def test_rules_that_mix_the_factors_need_both():
    for rule in ("stacking", "svd_redistribution", "rank_partition", "anchored"):
        with pytest.raises(InputError, match=f"training.factors = 'B': must be 'both' .*{rule}"):
            load_config(None, ["training.factors=B", f"aggregation.kind={rule}"])


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("training.prune_keep=0.5", "training.prune_keep = 0.5: must be None under .voting."),
        ("training.factors=B", "training.factors = 'B': must be 'both' under .voting."),
        ("adapter.start=weights", "adapter.start = 'weights': must be 'zero' under .voting."),
        ("adapter.rank=4", "voting.target_rank = 4.0: must be below adapter.rank = 4, or all slots stay"),
        ("training.sparse_rounds=2", "training.sparse_rounds = 2: needs adapter.form = 'lora'"),
        ("allocation={kind='progressive_depth'}", "allocation.kind = 'progressive_depth': does not go"),
        (
            "training={sparse_rounds=2, factors='both'}",
            "training.sparse_rounds = 2: must be 0 under .voting.",
        ),
    ],
)
def test_what_does_not_go_with_votes(setting, line):
    rest = ["adapter.form=lora"] if "needs" not in line else []
    with pytest.raises(InputError, match=line):
        load_config(None, ["method=fedara", "aggregation.kind=replication_padding", *rest, setting])


@pytest.mark.parametrize(
    "settings",
    [
        ["allocation.rank=4"],
        ["allocation.depth=2"],
        ["aggregation.kind=replication_padding", "allocation={kind='tiers', tiers=[{rank=2, share=1.0}]}"],
        ["aggregation.kind=stacking"],
    ],
)
def test_slots_that_took_over_weights_are_held_by_all(settings):
    with pytest.raises(InputError, match="adapter.start = 'weights': must be 'zero'"):
        load_config(None, ["method=federa", *settings])
    if "stacking" not in settings[0]:
        load_config(None, ["method=federa", "adapter.untrained=frozen", *settings])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["training.prune_keep=0.5", "aggregation.kind=layer_wise"], "where clients hold a part"),
        (
            [
                "allocation={kind='tiers', tiers=[{rank=2, share=1.0}]}",
                "aggregation.kind=zero_padding",
                "adapter.untrained=frozen",
            ],
            "zero_padding takes what a client does not train for 0",
        ),
    ],
)
def test_weights_that_slots_took_over_are_not_given_up(settings, line):
    with pytest.raises(InputError, match=f"adapter.start = 'weights': must be 'zero' .*{line}"):
        load_config(None, ["method=federa", *settings])
    load_config(None, ["method=federa", "adapter.start=zero", *settings])


def test_a_stage_of_training_that_would_train_nothing():
    with pytest.raises(InputError, match="training.factors = 'A': needs adapter.start = 'weights'"):
        load_config(None, ["training.factors=A"])
    load_config(None, ["method=federa", "training.factors=A"])
    with pytest.raises(InputError, match="training.sparse_rounds = 6: must be below rounds = 6"):
        load_config(None, ["method=slora", "rounds=6", "training.sparse_rounds=6"])
    load_config(None, ["method=slora", "rounds=6", "training.sparse_rounds=5"])


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(InputError, match="training = .*: set local_steps or local_epochs, not both"):
        load_config(None, ["training.local_steps=1", "training.local_epochs=1"])


def test_config_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="CONFIG = .*cannot be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(InputError, match="CONFIG = .*is not valid TOML"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="CONFIG = .*cannot be read"):
        load_config(tmp_path / "bytes.toml")


def test_python_users_get_the_same_line():
    with pytest.raises(ValueError, match="unknown key|Extra inputs"):
        Config(roundz=3)


def test_of_a_long_value_both_ends_are_shown():
    line = str(InputError("data.source", f"/home/{'x' * 90}/texts.csv", "no such file"))
    assert line.startswith("data.source = '/home/xxx")
    assert line.endswith("xxx/texts.csv': no such file")
    assert len(line) == len("data.source = ") + 80 + len(": no such file")
