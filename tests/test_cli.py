"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import soloist
from soloist import cli
from soloist.errors import CheckpointError
from tests.mpirun import free_port, mpirun, needs_mpirun

NOVELS = str(Path(__file__).parents[1] / "models" / "novels-moe-11m")
PROMPT = "The old house upon the hill"


def run(*arguments: str, **options) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), **options)


@pytest.fixture(scope="module")
def answer() -> dict:
    result = run("generate", NOVELS, PROMPT, "--device", "cpu", "--max-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_version():
    assert run("--version").stdout == f"{soloist.__version__}\n"


def test_help_is_quick_because_torch_is_not_imported():
    code = (
        "import sys; from typer.testing import CliRunner; from soloist import cli\n"
        "assert CliRunner().invoke(cli.app, ['generate', '--help']).exit_code == 0\n"
        "assert not {'torch', 'zmq', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_has_all_there_is_to_know(answer):
    (completion,) = answer["outputs"]
    assert len(completion["tokens"]) == 8
    assert completion["finish_reason"] == "length"
    assert answer["error"] is None


@pytest.mark.parametrize("form", ["--stream", "--no-stream"])
def test_text_goes_to_stdout_and_the_summary_to_stderr(answer, form):
    result = run("generate", NOVELS, PROMPT, "--layout", "ep2", "--device", "cpu", "--max-tokens", "8", form)
    assert result.stdout == PROMPT + answer["outputs"][0]["text"] + "\n"
    assert "novels-moe-11m on ep2: 8 tokens in" in result.stderr


def test_prompts_come_from_files_stdin_and_ids(answer, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nShe said\n")
    settings = ("--device", "cpu", "--max-tokens", "8", "--json")
    from_file = run("generate", NOVELS, "--prompt-file", str(file), *settings).stdout.splitlines()
    assert len(from_file) == 2
    assert json.loads(from_file[0])["outputs"][0]["tokens"] == answer["outputs"][0]["tokens"]
    ids = ",".join(map(str, answer["prompt_tokens"]))
    from_stdin = run("generate", NOVELS, "--prompt-file", "-", "--token-ids", *settings, input=ids)
    assert json.loads(from_stdin.stdout)["outputs"][0]["tokens"] == answer["outputs"][0]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NOVELS,), "prompt = []: give at least one, or --prompt-file"),
        ((NOVELS, "x", "--layout", "ep16x"), "layout = 'ep16x'"),
        ((NOVELS, "x", "--set", "deadline_s"), "--set = 'deadline_s': write KEY=VALUE"),
        ((NOVELS, "x", "--set", "deadlines=3"), "deadlines = '3': is no engine option"),
        ((NOVELS, "x", "--device", "tpu"), "device = 'tpu': choose one of auto, cpu, cuda"),
        ((NOVELS, "x y", "--token-ids"), "with --token-ids a prompt is a list of numbers"),
        ((NOVELS, "--prompt-file", "/no/file"), "--prompt-file = '/no/file': cannot be read"),
        (("no-model", "x"), "no-model"),
        (("ref-16l", "x"), "give random_weights a seed"),
        (("ref-16l", "x", "--random-weights", "1"), "ref-16l has no tokenizer; give token ids"),
        ((NOVELS, "x", "--layout", "ep9000", "--device", "cpu"), "layout = 'ep9000': 9000 processes of"),
        ((NOVELS, "x", "--temperature", "-1", "--device", "cpu"), "temperature = -1.0"),
        ((NOVELS, "x", "--chat", "--device", "cpu"), "no chat template"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = run("generate", *arguments)
    assert result.exit_code == cli.USER_ERROR
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--out", ("plan", "qwen3-30b-a3b")),
        ("--html", ("scenarios",)),
        ("--plot", ("simulate", "--model", "qwen3-30b-a3b", "--cluster", "h100-ib", "--layout", "ep8")),
        ("--output", ("placement", "solve", NOVELS, "--layout", "ep4")),
        ("--lines", ("bench", "offline", NOVELS, "--layout", "ep1")),
        ("--lines", ("bench", "exchange")),
        ("--trace", ("bench", "layer")),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, option, arguments):
    missing = run(*arguments, option, str(tmp_path / "no" / "file"))
    assert (missing.exit_code, missing.stdout) == (cli.USER_ERROR, "")
    assert f"{option} = '{tmp_path / 'no' / 'file'}': there is no folder" in missing.stderr
    folder = run(*arguments, option, str(tmp_path))
    assert folder.exit_code == cli.USER_ERROR
    assert "is a folder; name a file in it" in folder.stderr


def test_a_folder_that_cannot_be_filled_is_told_before_the_work(tmp_path):
    (tmp_path / "taken").touch()
    for command in (("compare", NOVELS, "--layout", "ep1"), ("serve", "http://127.0.0.1:9")):
        result = run("bench", *command, "--out", str(tmp_path / "taken" / "in it"))
        assert (result.exit_code, result.stdout) == (cli.USER_ERROR, "")
        assert f"{str(tmp_path / 'taken')!r} is a file; name a folder" in result.stderr


def test_a_file_that_cannot_be_written_after_all_is_named(tmp_path):
    """Where an option names a folder that the command makes."""
    plan, taken = tmp_path / "plan.json", tmp_path / "taken"
    assert run("plan", "qwen3-30b-a3b", "--gpus", "2", "--out", str(plan)).exit_code == 0
    taken.touch()
    result = run("export", str(plan), "--for", "soloist", "--folder", str(taken))
    assert result.exit_code == cli.USER_ERROR
    assert result.stderr.startswith(f"{taken}")


def test_without_a_network_the_preset_of_a_release_is_named(monkeypatch):
    def unreachable(name, weights):
        raise CheckpointError(f"{name}: cannot be downloaded")

    monkeypatch.setattr("soloist.specs.named.locate", unreachable)
    result = run("plan", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert result.exit_code == cli.FAILURE
    assert "the preset qwen3-30b-a3b has its shape, too" in result.stderr


def test_a_full_disk_is_no_internal_error():
    result = run("cluster", "dgx-h100", "--out", "/dev/full")
    assert (result.exit_code, result.stderr) == (cli.FAILURE, "/dev/full: No space left on device\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "--plot", "picture"),
        ("simulate", "plan.json", "--seed", "-1"),
        ("calibrate", "--ranks", "100000"),
        ("bench", "serve", "http://127.0.0.1:9", "--model", "x", "--timeout", "-1"),
        ("serve", NOVELS, "--port", "99999"),
        ("serve", NOVELS, "--log-level", "loud"),
        ("bench", "compare", NOVELS, "--layout", "ep1", "--runs", "0"),
        ("bench", "exchange", "--calls", "-1"),
        ("bench", "exchange", "--preset", "prefil"),
        ("bench", "exchange", "--model", "qwen3-30b-a3b", "--tokens", "0"),
        ("bench", "layer", "--model", "qwen3-30b-a3b", "--routing", "even"),
        ("bench", "layer", "--model", "qwen3-30b-a3b", "--alone", "2", "--experts", "7"),
        ("bench", "layer", "--model", "qwen3-30b-a3b", "--chunks", "3"),
        ("bench", "layer", "--pause-s", "-1"),
        ("bench", "layer", "--alone", "2", "--forms", "--explain"),
        ("bench", "layer", "--alone", "2", "--chunks", "2"),
        ("bench", "exchange", "--alone", "2", "--calls", "0"),
        ("bench", "layer", "--routing", "even"),
        ("placement", "solve", NOVELS, "--layout", "ep16", "--gpus-per-node", "0"),
        ("record", NOVELS, "--text", "x", "--window", "0"),
        ("cluster", "dgx-h100", "--gpus", "100000"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_with_their_option(arguments):
    result = run(*arguments)
    assert result.exit_code == cli.USER_ERROR
    assert arguments[-2] in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--from", "vllm serve Qwen/Qwen3-30B-A3B", "--gpus", "16"),
        ("plan", "--from", "vllm serve Qwen/Qwen3-30B-A3B", "--out", "plan.json"),
        ("simulate", "plan.json", "--layout", "ep8"),
        ("calibrate", "--nccl-tests", "job.log", "--only", "links"),
        ("calibrate", "--cluster", "dgx-h100"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments):
    result = run(*arguments)
    assert result.exit_code == cli.USER_ERROR
    assert f"{arguments[-2]} = {arguments[-1]!r}".replace("'16'", "16") in result.stderr
    assert "has no effect with" in result.stderr


@pytest.mark.parametrize(("module", "extra"), [("torch", "run"), ("uvicorn.config", "serve"), ("matplotlib", "plot")])
def test_a_plain_installation_says_what_to_install(monkeypatch, module, extra):
    def missing(as_json):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("soloist.planner.checks.run_crossovers", missing)
    result = run("crossovers")
    assert result.exit_code == cli.USER_ERROR
    assert f"needs {module.partition('.')[0]}; in a checkout: pip install '.[{extra}]'" in result.stderr


def test_a_traceback_for_those_who_ask():
    result = run("-v", "generate", "no-model", "x")
    assert result.exit_code == cli.USER_ERROR
    assert "Traceback" in result.stderr


def test_a_failure_is_exit_code_1(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(Path(NOVELS, name).read_bytes())
    result = run("generate", str(tmp_path), "x", "--device", "cpu")
    assert result.exit_code == cli.FAILURE
    assert "rank 0" in result.stderr


def test_one_prompt_of_several_may_fail(answer):
    settings = ("--device", "cpu", "--max-tokens", "8", "--no-stream", "--set", "max_positions=20")
    result = run("generate", NOVELS, PROMPT, "x " * 30, *settings)
    assert result.exit_code == cli.USER_ERROR
    assert result.stdout.startswith(PROMPT + answer["outputs"][0]["text"])
    assert "1 of 2 prompts were not answered" in result.stderr


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def start_rank(
    rank: int, size: int, port: int, layout: str, *more: str, names: tuple[str, ...] = TORCHRUN
) -> subprocess.Popen:
    """As a launcher of ranks does: nothing but environment variables."""
    environment = dict(zip(names, (rank, size, rank, size), strict=True))
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "soloist", "generate", NOVELS, PROMPT]
    command += ["--layout", layout, "--device", "cpu", "--max-tokens", "8", *more]
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ranks_that_others_start_join_and_rank_0_prints(answer):
    port = free_port()
    ranks = [start_rank(rank, 2, port, "tp2", names=SRUN) for rank in range(2)]
    outputs = [process.communicate(timeout=280) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert outputs[0][0] == PROMPT + answer["outputs"][0]["text"] + "\n"
    assert outputs[1][0] == ""


@needs_mpirun
def test_mpirun_gives_the_same_text_over_mpi(answer):
    settings = ("--layout", "ep2", "--transport", "mpi", "--device", "cpu", "--max-tokens", "8")
    ranks = mpirun(2, "-m", "soloist", "generate", NOVELS, PROMPT, *settings)
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout == PROMPT + answer["outputs"][0]["text"] + "\n"


def test_joining_with_other_options_names_who_has_which():
    port = free_port()
    ranks = [start_rank(rank, 2, port, "tp2", "--set", f"block_size={8 << rank}") for rank in range(2)]
    for rank, process in enumerate(ranks):
        _, errors = process.communicate(timeout=280)
        assert process.returncode == cli.FAILURE
        told = "option block_size = 16 on rank 1, 8 on the others: start every rank with the same command and plan"
        assert errors.splitlines()[-1] == f"rank {rank}: {told}"
        assert "Traceback" not in errors


def test_joining_with_a_layout_of_another_size_names_both():
    process = start_rank(0, 2, free_port(), "ep16")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == cli.USER_ERROR
    assert "WORLD_SIZE = 2: layout ep16 needs 16 ranks" in errors
