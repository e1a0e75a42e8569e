"""Flags become settings, and wrong ones become one clear line."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hetero_sglang.config import HeteroConfig, parse_bytes
from hetero_sglang.errors import ConfigError
from hetero_sglang.sglang_adapter import arguments, refusals


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_cli_args(lambda _: None, parser)
    return parser.parse_args(words)


def test_without_the_policy_there_are_no_settings() -> None:
    assert arguments.config_from_namespace(parse()) is None


def test_every_flag_reaches_its_field() -> None:
    words = (
        "--kv-policy heterocache --kv-policy-profile p.json --kv-policy-ratio 0.7 "
        "--kv-policy-drift-threshold 0.4 --kv-policy-drift-interval 3 "
        "--kv-policy-memd ipc:///run/memd.sock --kv-policy-memd-bytes 2GiB "
        "--kv-policy-min-tokens 99 --kv-policy-retrieval sync --kv-policy-preset paper "
        "--kv-policy-pivot-rows budget --kv-policy-watch-dtype int4 --kv-policy-window 16 "
        "--kv-policy-refresh-share 0.75"
    )
    assert arguments.config_from_namespace(parse(*words.split())) == HeteroConfig(
        profile="p.json",
        ratio=0.7,
        drift_threshold=0.4,
        drift_interval=3,
        memd_address="ipc:///run/memd.sock",
        memd_bytes=2 * 2**30,
        min_tokens=99,
        retrieval="sync",
        preset="paper",
        pivot_rows="budget",
        watch_dtype="int4",
        window=16,
        refresh_share=0.75,
        is_filling=False,
    )


def test_presets_are_resolved_and_single_flags_override_them() -> None:
    def resolved(words: str) -> HeteroConfig | None:
        return arguments.config_from_namespace(parse("--kv-policy", "heterocache", *words.split()))

    assert resolved("") == HeteroConfig()
    paper = HeteroConfig(
        preset="paper",
        pivot_rows="all",
        watch_dtype="model",
        window=1,
        refresh_share=1.0,
        min_tokens=1,
        is_filling=False,
    )
    assert resolved("--kv-policy-preset paper") == paper
    assert resolved("--kv-policy-preset paper --kv-policy-window 8") == replace(paper, window=8)
    # Pivots that keep their rows watch with them, whatever the preset says of watched keys.
    assert resolved("--kv-policy-pivot-rows all") == HeteroConfig(
        pivot_rows="all", watch_dtype="model"
    )


def test_settings_survive_the_way_to_another_process() -> None:
    config = HeteroConfig(ratio=0.7, retrieval="off")
    assert HeteroConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kv-policy-ratio 0.6", r"--kv-policy-ratio 0\.6 has no effect without"),
        ("--kv-policy heterocache --kv-policy-ratio 0", r"--kv-policy-ratio.*0\.0"),
        ("--kv-policy heterocache --kv-policy-ratio nan", r"--kv-policy-ratio.*nan"),
        ("--kv-policy heterocache --kv-policy-ratio 1.5", r"--kv-policy-ratio.*1\.5"),
        ("--kv-policy heterocache --kv-policy-drift-threshold 2", r"drift-threshold.*2\.0"),
        ("--kv-policy heterocache --kv-policy-drift-interval 0", r"drift-interval.*got 0"),
        ("--kv-policy heterocache --kv-policy-min-tokens 0", r"min-tokens.*got 0"),
        ("--kv-policy heterocache --kv-policy-refresh-share 0", r"refresh-share.*got 0\.0"),
        ("--kv-policy heterocache --kv-policy-window 0", r"--kv-policy-window.*256.*got 0"),
        (
            "--kv-policy heterocache --kv-policy-pivot-rows all --kv-policy-watch-dtype int8",
            r"--kv-policy-watch-dtype must be model.*--kv-policy-pivot-rows all.*got 'int8'",
        ),
        ("--kv-policy-window 8", r"--kv-policy-window 8 has no effect without"),
        ("--kv-policy heterocache --kv-policy-memd tcp://h:1", r"--kv-policy-memd .*tcp://h:1"),
        ("--kv-policy heterocache --kv-policy-memd-bytes lots", r"memd-bytes 'lots'"),
    ],
)
def test_a_wrong_value_names_flag_and_value(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments.config_from_namespace(parse(*words.split()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", 0), ("4096", 4096), ("512MiB", 2**29), ("1.5G", 3 * 2**29), ("8 GiB", 2**33)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


ON: dict[str, object] = {
    "--device": "xpu",
    "--disaggregation-mode": "prefill",
    "--kv-cache-dtype": "fp8_e4m3",
    "--page-size": 16,
    "--cuda-graph-backend-prefill": "full",
    "--kv-canary": "log",
    "--speculative-algorithm": "EAGLE",
    "--dllm-algorithm": "x",
    "--radix-cache-backend": "flexkv",
    **dict.fromkeys(("--pp-size", "--tp-size", "--dp-size", "--attn-cp-size", "--dcp-size"), 2),
}


@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=lambda refusal: refusal.flag)
def test_each_refusal_applies_and_names_flag_value_and_remedy(refusal: refusals.Refusal) -> None:
    field = refusal.flag.lstrip("-").replace("-", "_")
    value = ON.get(refusal.flag, True)
    args = SimpleNamespace(**{"device": "cpu", field: value})
    with pytest.raises(ConfigError, match=re.escape(f"{refusal.flag} {value} does not go")) as e:
        refusals.check_server_args(args)
    assert refusal.remedy in str(e.value)


@pytest.mark.parametrize("given", ["", "0", "yes"])
def test_a_gpu_is_refused_with_what_lets_one_try(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("HETERO_SGLANG_UNTESTED_CUDA", given)
    with pytest.raises(ConfigError, match=r"--device cuda does not go.*not been run on a GPU") as e:
        refusals.check_server_args(SimpleNamespace(device="cuda"))
    assert "HETERO_SGLANG_UNTESTED_CUDA=1" in str(e.value)


def test_who_tries_a_gpu_is_warned_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HETERO_SGLANG_UNTESTED_CUDA", "1")
    refusals.check_server_args(SimpleNamespace(device="cuda"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has not been run on a GPU" in caplog.text
    # What is refused elsewhere is refused there too, and no other device is let through.
    with pytest.raises(ConfigError, match="--tp-size 2"):
        refusals.check_server_args(SimpleNamespace(device="cuda", tp_size=2))
    with pytest.raises(ConfigError, match="--device xpu"):
        refusals.check_server_args(SimpleNamespace(device="xpu"))


def test_prefill_graphs_that_sglang_chose_by_itself_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HETERO_SGLANG_UNTESTED_CUDA", "1")

    def args(device: str, backend: str) -> SimpleNamespace:
        chosen = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        return SimpleNamespace(device=device, cuda_graph_config=chosen)

    with pytest.raises(ConfigError, match="--cuda-graph-backend-prefill"):
        refusals.check_server_args(args("cuda", "full"))
    refusals.check_server_args(args("cuda", "breakable"))
    refusals.check_server_args(args("cuda", "disabled"))
    # On the CPU nothing is captured, whatever is written there.
    refusals.check_server_args(args("cpu", "full"))


def test_refused_flags_exist_in_sglang() -> None:
    import msgspec
    from sglang.srt.server_args import ServerArgs

    fields = {field.name for field in msgspec.structs.fields(ServerArgs)}
    assert {r.flag.lstrip("-").replace("-", "_") for r in refusals.REFUSALS} <= fields


def test_defaults_of_sglang_are_not_refused() -> None:
    import msgspec
    from sglang.srt.server_args import ServerArgs

    defaults = {
        field.name: field.default
        for field in msgspec.structs.fields(ServerArgs)
        if field.default is not msgspec.NODEFAULT
    }
    refusals.check_server_args(SimpleNamespace(**{**defaults, "device": "cpu"}))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"mamba_d_state": 128}, "state-space"),
    ],
)
def test_models_without_full_attention_are_refused(config: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        refusals.check_model_config(config)


@pytest.mark.parametrize(
    ("kv", "model"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_kv_of_another_dtype_is_refused(kv: torch.dtype, model: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"{kv} for a model of {model}.*--kv-cache-dtype to auto"):
        refusals.check_kv_dtype(kv, model)
    for dtype in refusals.KV_DTYPES:
        refusals.check_kv_dtype(dtype, dtype)


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ({"sliding_window_size": 4096}, "window: 4096"),
        ({"logit_cap": 30.0}, r"logit cap: 30\.0"),
        ({"is_cross_attention": True}, "cross attention: True"),
    ],
)
def test_layers_without_full_attention_are_refused(
    difference: dict[str, object], reason: str
) -> None:
    plain = {
        "layer_id": 3,
        "sliding_window_size": -1,
        "logit_cap": 0.0,
        "is_cross_attention": False,
    }
    refusals.check_layer(SimpleNamespace(**plain))
    refusals.check_layer(SimpleNamespace(**plain | {"sliding_window_size": None}))
    with pytest.raises(ConfigError, match=f"layer 3 .*{reason}"):
        refusals.check_layer(SimpleNamespace(**plain | difference))
    with pytest.raises(ConfigError, match="sinks: True"):
        refusals.check_layer(SimpleNamespace(**plain), has_sinks=True)


def test_a_window_that_is_switched_off_is_no_reason() -> None:
    refusals.check_model_config({"sliding_window": 4096, "use_sliding_window": False})
    refusals.check_model_config({"sliding_window": None, "layer_types": ["full_attention"]})
