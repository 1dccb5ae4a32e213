"""The configuration of a memory, and the authors' file of it."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest

from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.nn.config import ARCHIVED, WITHOUT_EFFECT


def test_a_saved_configuration_is_loaded_unchanged(tmp_path):
    config = DeltaMemConfig(rank=4, delta_heads=("q", "o"), target_layers=(1, 3), alpha=8, num_state_heads=4)
    config.save(tmp_path)
    written = json.loads((tmp_path / "delta_mem_config.json").read_text())
    assert written["delta_heads"] == ["q", "o"]
    assert written["alpha"] == 8.0
    assert ARCHIVED.items() <= written.items()
    assert DeltaMemConfig.load(tmp_path) == config
    assert DeltaMemConfig.from_dict({}) == DeltaMemConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rnak": 8, "alhpa": 1}, "unknown fields in a δ-mem configuration: 'alhpa', 'rnak'"),
        ({"num_memory_partitions": 2}, "num_memory_partitions is archived: it must be 1"),
        ({"latent_memory_layers": [3]}, "latent_memory_layers is archived"),
        ({"rank": 0}, "rank must be from 1 to 128, got 0"),
        ({"rank": 8.5}, "rank must be int, got float 8.5"),
        ({"rank": True}, "rank must be int, got bool"),
        ({"alpha": "16"}, "alpha must be float, got str '16'"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"normalize_qk": 2}, "normalize_qk must be bool, got int 2"),
        ({"normalize_qk": 1.0}, "normalize_qk must be bool, got float 1.0"),
        ({"state_update_mode": "fast"}, "mode must be one of"),
        ({"memory_write_granularity": "message_proposals"}, "memory_write_granularity must be one of"),
        ({"delta_heads": ["q", "x"]}, "delta_heads must be some of q, k, v, o"),
        ({"delta_heads": ["q", "q"]}, "each once"),
        ({"delta_heads": [1]}, "delta_heads must be a list of str"),
        ({"target_layers": ["1"]}, "target_layers must be a list of int"),
        ({"target_layers": [0.0, 1.5]}, "target_layers must be a list of int"),
        ({"delta_scale_init": 2.0}, "delta_scale_init must be between 0 and delta_scale_max=2.0"),
        ({"delta_o_rmsnorm_eps": 0.0}, "delta_o_rmsnorm_eps must be greater than 0"),
        ({"num_state_heads": 0}, "num_state_heads must be at least 1"),
        ([], "a configuration must be a dict"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_raise(data, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        DeltaMemConfig.from_dict(data)
    (tmp_path / "delta_mem_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        DeltaMemConfig.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_configuration_file_that_is_missing_or_broken_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        DeltaMemConfig.load(tmp_path)
    (tmp_path / "delta_mem_config.json").write_text('{"rank": 8')
    with pytest.raises(ValueError, match=r"delta_mem_config\.json"):
        DeltaMemConfig.load(tmp_path)


def test_configurations_are_compared_by_value():
    config = DeltaMemConfig(delta_heads="q, o")
    assert config.delta_heads == ("q", "o")
    assert replace(config, rank=4) != config
    assert hash(config) == hash(DeltaMemConfig(delta_heads=["q", "o"]))


@pytest.mark.parametrize("source", ["dict", "file"])
@pytest.mark.parametrize(
    ("data", "used", "messages"),
    [
        ({"rank": 8.0}, {"rank": 8}, ["rank=8.0 is read as 8"]),
        ({"rank": 4.0, "num_state_heads": 2.0}, {"rank": 4, "num_state_heads": 2}, ["rank=4.0", "num_state_heads=2.0"]),
        ({"normalize_qk": 0}, {"normalize_qk": False}, ["normalize_qk=0 is read as False"]),
        ({"delta_o_rmsnorm": 1}, {"delta_o_rmsnorm": True}, ["delta_o_rmsnorm=1 is read as True"]),
        ({"target_layers": [0.0, 2]}, {"target_layers": (0, 2)}, [r"target_layers=\[0.0, 2\] is read as \[0, 2\]"]),
        ({"latent_memory_slots": 7, "rank": 4}, {"rank": 4}, ["latent_memory_slots=7 is ignored, .* no effect"]),
        ({"memory_reader_read_only": False}, {}, ["memory_reader_read_only=False is ignored"]),
    ],
    ids=str,
)
def test_what_the_authors_code_also_accepts_warns(data, used, messages, source, tmp_path):
    (tmp_path / "delta_mem_config.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=r"^deltamem_kernels: ") as caught:
        config = DeltaMemConfig.from_dict(data) if source == "dict" else DeltaMemConfig.load(tmp_path)
    assert config == DeltaMemConfig(**used)
    assert all(type(getattr(config, name)) is type(value) for name, value in used.items())
    assert len(caught) == 1
    for message in messages:
        assert re.search(message, str(caught[0].message))


@pytest.mark.parametrize("name", ARCHIVED)
def test_an_archived_field_that_had_an_effect_raises_and_the_others_warn(name):
    default = ARCHIVED[name]
    other = {bool: lambda: not default, str: lambda: "other", list: lambda: [1]}.get(
        type(default), lambda: default + 1
    )()
    if name in WITHOUT_EFFECT:
        with pytest.warns(UserWarning, match=f"^deltamem_kernels: {name}={other!r} is ignored"):
            assert DeltaMemConfig.from_dict({name: other}) == DeltaMemConfig()
    else:
        with pytest.raises(ValueError, match=f"{name} is archived: it must be"):
            DeltaMemConfig.from_dict({name: other})


def test_a_configuration_of_exact_types_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeltaMemConfig.from_dict(DeltaMemConfig(rank=4, alpha=8, delta_o_rmsnorm=True).to_dict())
        DeltaMemConfig.from_dict({"alpha": 8})


@pytest.mark.parametrize(("fields", "message"), [({"rank": 8.0}, "rank must be int"), ({"normalize_qk": 1}, "be bool")])
def test_the_constructor_takes_exact_types_only(fields, message):
    with pytest.raises(TypeError, match=message):
        DeltaMemConfig(**fields)
