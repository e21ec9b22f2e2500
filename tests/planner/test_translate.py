from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.engine_commands import Engine, read_command
from soloist.planner.engines import launch_flags
from soloist.planner.environment import recommended, review
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.translate import advise
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load

SGLANG = "python -m sglang.launch_server --model-path"


@pytest.mark.parametrize(
    ("command", "layout"),
    [
        ("vllm serve M -tp 8 -pp 2", "tp8pp2"),
        ("vllm serve M --tensor-parallel-size=8 --enable-expert-parallel", "attn8ep8"),
        ("vllm serve M -tp 1 -dp 16 --enable-expert-parallel --all2all-backend deepep_low_latency", "ep16"),
        (f"{SGLANG} M --tp-size 8 --pp-size 2", "tp8pp2"),
        (f"{SGLANG} M --tp-size 16 --attn-dp-size 16 --moe-a2a-backend deepep", "ep16"),
        (f"{SGLANG} M --tp 16 --ep-size 8", "attn16ep8tp2"),
        (f"{SGLANG} M --tp 8 --dp-size 2", "dp2tp8"),
        (f"{SGLANG} M --tp 16 --dp 16 --enable-dp-attention --enable-deepep-moe", "ep16"),
        (f"{SGLANG} M --tp 16 --dp 4 --enable-dp-attention --moe-a2a-backend deepep --pp 2", "attn4pp2ep16"),
        ("sglang serve --model-path M --tp=8 --ep 8", "attn8ep8"),
        ("vllm serve --enable-expert-parallel M -dp 8", "ep8"),
        ("vllm serve M -dp 1 -tp 8 --enable-expert-parallel --no-enable-expert-parallel", "tp8"),
        ("python3 -m vllm.entrypoints.openai.api_server --model M -tp 4", "tp4"),
        ("docker run --gpus all -e A=1 -v /m:/m vllm/vllm-openai:v0.11.0 --model M -tp 4", "tp4"),
        ("docker run lmsysorg/sglang:latest python3 -m sglang.launch_server --model-path M --tp 4", "tp4"),
        ("vllm serve \\\n  M \\\r\n  --tensor-parallel-size 4 \\\n", "tp4"),
        ("trtllm-serve M --tp_size 8 --pp_size 2", "tp8pp2"),
        ("mpirun -n 16 trtllm-llmapi-launch trtllm-serve serve M --tp_size 16 --ep_size 16", "attn16ep16"),
        ("trtllm-serve M --tensor_parallel_size 8 --ep_size 2 --backend pytorch", "attn8ep2tp4"),
        ("A=1 /opt/bin/vllm serve M -tp 4 --seed -1 2>&1 | tee -a log", "tp4"),
    ],
)
def test_commands_in_our_words(command: str, layout: str) -> None:
    assert str(read_command(command).layout) == layout


def test_overlap_replicas_and_limits_are_read() -> None:
    flags = (
        "--tp 16 --attn-dp-size 16 --moe-a2a-backend deepep --enable-two-batch-overlap --ep-num-redundant-experts 16"
    )
    found = read_command(f"{SGLANG} deepseek-ai/DeepSeek-R1 {flags} --max-running-requests 512")
    assert (found.is_overlapped, found.redundant, found.sequences) == (True, 16, 512)


def test_tensorrt_s_options_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    command = f"trtllm-serve M --tp_size 8 --max_batch_size 64 --extra_llm_api_options {file}"
    assert "cannot be read" in read_command(command).notes[0]
    file.write_text(
        "enable_attention_dp: true\nmoe_expert_parallel_size: 8\nkv_cache_config: {dtype: fp8}\nx: {y: 1}\n"
    )
    found = read_command(command)
    assert (str(found.layout), found.sequences, found.kv, found.notes) == ("ep8", 512, "fp8", ())
    file.write_text(
        "enable_attention_dp: false\nmoe_tensor_parallel_size: 2\nspeculative_config: {decoding_type: MTP}\n"
    )
    found = read_command(command)
    assert (str(found.layout), found.sequences) == ("attn8ep4tp2", 64)
    assert "speculative" in found.notes[0]
    file.write_text("- a list")
    assert "cannot be read" in read_command(command).notes[0]


def test_what_a_change_leaves_out_is_said() -> None:
    load, used = Load.parse("prompt=1000,output=200"), Calibration.published()
    text = "vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep --all2all-backend deepep_low_latency --enable-dbo"
    notes = "; ".join(advise(text, cluster("hgx-h100"), load, used).notes)
    assert "Leave out --enable-dbo" in notes
    assert "of ep8 with overlap on" in notes
    notes = "; ".join(advise("trtllm-serve Qwen/Qwen3-30B-A3B --tp_size 8", cluster("hgx-h100"), load, used).notes)
    assert "enable_attention_dp: true" in notes


def test_what_does_not_work_is_noted() -> None:
    assert "overlaps" in read_command("vllm serve M -tp 8 -ep --enable-dbo").notes[0]
    assert "cuts each expert" in read_command("vllm serve M -tp 1 -dp 8").notes[0]


def test_models_wherever_they_stand() -> None:
    for text in ("vllm serve --enable-eplb M", "vllm serve M", "vllm serve --model M", "sglang serve --model M"):
        assert read_command(text).model == "M"


def test_replicas_in_every_spelling() -> None:
    """vLLM has none without --enable-eplb."""
    spellings = ("--eplb-config.num_redundant_experts 32", "--num-redundant-experts=32")
    for flags in (*spellings, """--eplb-config '{"num_redundant_experts": 32}'"""):
        assert read_command(f"vllm serve M -dp 8 -ep --enable-eplb {flags}").redundant == 32
    found = read_command(f"vllm serve M -dp 8 -ep {spellings[0]}")
    assert found.redundant == 0
    assert "--enable-eplb" in found.notes[0]


def test_a_backend_in_the_environment() -> None:
    assert read_command("VLLM_ALL2ALL_BACKEND=deepep_low_latency vllm serve M -dp 8 -ep --enable-dbo").is_overlapped


def test_what_is_not_modelled_is_noted() -> None:
    text = """vllm serve M -tp 8 --speculative-config '{"method": "mtp"}' -dcp 8 --enforce-eager --quantization awq"""
    notes = "; ".join(read_command(text).notes)
    for name in ("--speculative-config", "--decode-context-parallel-size", "--enforce-eager", "--quantization awq"):
        assert name in notes
    assert not read_command("vllm serve M -dcp 1 --port 8000 --max-model-len 4096 --cpu-offload-gb 0").notes


def test_data_types() -> None:
    found = read_command("vllm serve M --quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3")
    assert (found.precision, found.kv) == ("fp4", "fp8")
    used, load = Calibration.published(), Load.parse("prompt=1000,output=200")
    plain, named = (
        advise(f"vllm serve Qwen/Qwen3-235B-A22B{suffix} -tp 8", cluster("hgx-h200"), load, used).current.deployment
        for suffix in ("", "-FP8")
    )
    assert (plain.precision.experts, named.precision.experts) == ("bf16", "fp8")
    other = advise("vllm serve openai/gpt-oss-120b --kv-cache-dtype fp8", cluster("hgx-h200"), load, used)
    assert (other.current.deployment.precision.experts, other.current.deployment.precision.kv) == ("fp4", "fp8")


def test_a_server_for_decode_alone_does_not_prefill() -> None:
    text = f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 32 --attn-dp-size 32 --moe-a2a-backend deepep"
    load, used = Load.parse("prompt=2000,output=200"), Calibration.published()
    whole, alone = (
        advise(text + more, cluster("hgx-h100"), load, used) for more in ("", " --disaggregation-mode decode")
    )
    assert alone.current.tpot.value < 1.05 * alone.current.decode.seconds.value
    assert alone.current.rate_per_gpu > 2 * whole.current.rate_per_gpu


def test_a_server_for_prefill_alone_does_not_decode() -> None:
    text = f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 32 --attn-dp-size 32 --moe-a2a-backend deepep"
    load, used = Load.parse("prompt=2000,output=200,tpot=50ms"), Calibration.published()
    alone = advise(f"{text} --disaggregation-mode prefill", cluster("hgx-h100"), load, used)
    score = alone.current
    assert not score.decodes
    assert score.rate == score.input_rate
    assert score.memory["KV cache"] < 1e9, "no more prompts than a step takes"
    assert "prefill alone" in alone.notes[0]


def test_heads_that_an_engine_would_not_cut() -> None:
    advice = advise("vllm serve Qwen/Qwen3-30B-A3B -tp 3", cluster("hgx-h100"), Load.parse(""), Calibration.published())
    assert any("does not start" in note and "32 heads" in note for note in advice.notes)
    deployment = Deployment(
        model=preset("deepseek-v3"), layout=Layout.parse("attn6ep72"), precision=Precision.named("fp8")
    )
    assert launch_flags("sglang", deployment, is_overlapped=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "llama-server -m x",
        "vllm bench M",
        "vllm serve M -tp zero",
        'vllm serve "M',
        "vllm serve M --eplb-config {bad",
        "vllm serve",
        "trtllm-serve --tp_size 4",
    ],
)
def test_other_commands_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        read_command(text)


@pytest.mark.parametrize("layout", ["tp8", "tp8pp2", "ep16", "attn8ep8", "attn2ep16", "attn16ep8tp2"])
@pytest.mark.parametrize(
    ("engine", "start", "not_said"),
    [
        ("vllm", "vllm serve M", {"attn16ep8tp2"}),  # it cannot cut experts inside EP groups
        ("sglang", f"{SGLANG} M", set[str]()),
        ("tensorrt", "trtllm-serve M", {"attn2ep16"}),
    ],
)
def test_flags_read_back_as_the_same_layout(
    engine: Engine, start: str, not_said: set[str], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_text("enable_attention_dp: true")
    deployment = Deployment(model=preset("deepseek-v3"), layout=Layout.parse(layout), precision=Precision.named("fp8"))
    flags = launch_flags(engine, deployment, is_overlapped=False)
    if layout in not_said:
        assert flags is None
    else:
        assert str(read_command(f"{start} {flags}").layout) == layout


def test_advice_names_flags_and_gain() -> None:
    load = Load.parse("prompt=1000,output=1000,sequences=2048")
    text = f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 8 --pp-size 2"
    advice = advise(text, cluster("dgx-h100"), load, Calibration.published())
    assert str(advice.current.deployment.layout) == "tp8pp2"
    assert advice.best is not None
    assert advice.gain > 0.2
    assert "--attn-dp-size" in advice.flags
    assert any("GPU time of a token" in note for note in advice.notes)


def test_advice_compares_like_with_like() -> None:
    """A limit of the command holds for the change, too; what does not fit at once is said."""
    text = f"{SGLANG} deepseek-ai/DeepSeek-V3 --tp 16 --ep 16 --max-running-requests 512"
    advice = advise(text, cluster("hgx-h100"), Load.parse("prompt=1000,output=1000"), Calibration.published())
    assert advice.best is not None
    assert advice.best.sequences == 512
    assert any("sequences only" in note for note in advice.notes)


def test_environment_explains_and_names_obsolete_variables() -> None:
    lines = review({"NCCL_TREE_THRESHOLD": "0", "NCCL_LL_THRESHOLD": "0", "NCCL_IB_DISABLE": "0"})
    assert "obsolete" in lines[0]
    assert "not on" in lines[0]
    assert "NCCL_PROTO" in lines[1]
    assert lines[2].startswith("NCCL_IB_DISABLE=0")
    one, two = recommended(cluster("dgx-h100"), 8), recommended(cluster("dgx-h100"), 16, mpi=True)
    assert "NCCL_CROSS_NIC" not in [v.name for v in one]
    assert {"NCCL_CROSS_NIC", "OMPI_MCA_pml"} <= {v.name for v in two}
    assert all(v.why for v in two)
