from __future__ import annotations

import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.engines import launch_flags, read_command
from soloist.planner.environment import recommended, review
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.translate import advise, model_of
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


def test_what_does_not_work_is_noted() -> None:
    assert "overlaps" in read_command("vllm serve M -tp 8 -ep --enable-dbo").notes[0]
    assert "cuts each expert" in read_command("vllm serve M -tp 1 -dp 8").notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "llama-server -m x",
        "vllm bench M",
        "vllm serve M -tp zero",
        'vllm serve "M',
        "vllm serve M --eplb-config {bad",
    ],
)
def test_other_commands_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        read_command(text)


@pytest.mark.parametrize("layout", ["tp8", "tp8pp2", "ep16", "attn8ep8", "attn2ep16", "attn16ep8tp2"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_flags_read_back_as_the_same_layout(engine: str, layout: str) -> None:
    deployment = Deployment(model=preset("deepseek-v3"), layout=Layout.parse(layout), precision=Precision.named("fp8"))
    flags = launch_flags("vllm" if engine == "vllm" else "sglang", deployment, is_overlapped=False)
    if flags is None:
        assert engine == "vllm"
        assert deployment.layout.tp > 1  # vLLM cannot cut experts inside EP groups
        return
    command = f"vllm serve M {flags}" if engine == "vllm" else f"{SGLANG} M {flags}"
    assert read_command(command).layout.size == deployment.layout.size
    assert str(read_command(command).layout) == layout


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


def test_models_by_hub_id() -> None:
    assert model_of("Qwen/Qwen3-30B-A3B-Instruct-2507").name == "qwen3-30b-a3b"
    assert model_of("deepseek-ai/DeepSeek-R1-0528").name == "deepseek-v3"
    with pytest.raises(ConfigurationError, match="config.json"):
        model_of("someone/unheard-of")


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
