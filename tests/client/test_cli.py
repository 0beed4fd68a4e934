"""The command line against a real platform: results, bad input, exit codes, and --json."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ethogram.cli.output import number, pairs
from ethogram.cli.run import Request, flag, run_command
from ethogram.client import Client
from ethogram.errors import InvalidInput
from ethogram.platform.stack import Platform, free_port
from ethogram.specs.kinds import KINDS
from tests.client.conftest import Cli

IDLE = ("--queue", "nobody")


def write(folder: Path, text: str) -> str:
    file = folder / "spec.yaml"
    file.write_text(text)
    return str(file)


def test_a_job_goes_in_from_a_file_with_set_and_labels(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path, "subjects: 7\ntraining:\n  learning_rate: 1e-3\n")
    made = cli(
        "submit",
        "generation",
        "-f",
        file,
        "--set",
        "training.steps=5",
        "--name",
        "n",
        "--label",
        "a=b",
        *IDLE,
        "--json",
    )
    assert made.code == 0
    job = made.json
    assert job["labels"] == {"name": "n", "a": "b"}
    spec = job["spec"]
    assert (spec["subjects"], spec["training"]["learning_rate"], spec["training"]["steps"]) == (7, 0.001, 5)
    assert cli("jobs", "get", job["id"], "--json").json["id"] == job["id"]
    assert job["id"] in cli("jobs", "get", job["id"]).out
    assert [item["id"] for item in cli("jobs", "list", "--label", "name=n", "--json").json] == [job["id"]]
    assert job["id"] in cli("jobs", "list", "--state", "queued").out
    assert cli("jobs", "cancel", job["id"], "--json").json["state"] == "CANCELLED"
    watched = cli("jobs", "watch", job["id"], "--json")
    assert watched.code == 1
    assert [json.loads(line)["type"] for line in watched.out.splitlines()][-1] == "state"
    assert cli("jobs", "watch", job["id"]).code == 1
    assert cli("jobs", "logs", job["id"]).code == 0
    assert cli("jobs", "retry", job["id"], "--json").json["state"] == "QUEUED"
    cli("jobs", "cancel", job["id"])


def test_a_flag_of_a_required_field_has_no_default() -> None:
    app = typer.Typer()

    @run_command(app, KINDS["crossmodal"], flags={"zoo.artifact": flag(str, "--zoo", help="The zoo.")})
    def train() -> Request:
        """Train."""
        return Request()

    shown = CliRunner().invoke(app, ["--help"]).output
    assert "The zoo." in shown and "[default: " not in shown.partition("--zoo")[2].partition("--output")[0]


def test_large_numbers_are_written_in_full() -> None:
    values = {366.94: "366.9", 9999.4: "9999", 9999.96: "10000", 1e6: "1000000", 1234567.8: "1234568", 0.5: "0.5"}
    assert {value: number(value, 4) for value in values} == values
    assert number(2000.25, 10) == "2000.25" and number(-1e7) == "-10000000" and number(1e-5) == "1e-05"
    assert number(1e14, 4) == "100000000000000" and number(1e30) == "1e+30"


def test_a_dry_run_shows_every_default_and_queues_nothing(cli: Cli, client: Client) -> None:
    before = len(client.jobs(limit=None))
    answer = cli("submit", "generation", "--set", "subjects=9", "--dry-run")
    assert answer.code == 0
    assert answer.json["spec"]["subjects"] == 9
    assert answer.json["spec"]["vocab_size"] == 7
    assert len(client.jobs(limit=None)) == before


@pytest.mark.parametrize(
    ("arguments", "yaml", "says"),
    [
        (["submit", "nothing"], None, "kind"),
        (["submit", "generation"], "unknown: 1\n", "spec.unknown"),
        (["submit", "generation"], "subjects: '3'\n", "spec.subjects"),
        (["submit", "generation"], "subjects: -1\n", "spec.subjects"),
        (["submit", "generation"], "training: {learning_rate: .inf}\n", "spec.training.learning_rate"),
        (["submit", "generation"], "training: {learning_rate: 1e400}\n", "spec.training.learning_rate"),
        (["submit", "generation"], "training: {steps: 3}\ntraining: {steps: 4}\n", "duplicate key"),
        (["submit", "generation"], "- a\n", "holds a list; a spec is a mapping"),
        (["submit", "generation"], "", "is empty; a spec is a mapping"),
        (["submit", "generation"], "a: [\n", "line 2"),
        (["submit", "generation", "--set", "training.steps=many"], None, "spec.training.steps"),
        (["submit", "generation", "--set", "training.steps"], None, "write PATH=VALUE"),
        (["submit", "generation", "--label", "x"], None, "--label: x is not of the form KEY=VALUE"),
        (["submit", "generation", "--priority", "high"], None, "--priority"),
        (["submit", "generation", "--nothing"], None, "--nothing"),
        (["submit", "generation", "-f", "nowhere.yaml"], None, "nowhere.yaml cannot be read"),
        (["submit"], None, "KIND"),
        (["pipeline"], "kind: generation\n", "must hold `jobs:`"),
        (["pipeline"], "jobs: {a: {kind: generation, spec: {x: 1}}}\n", "jobs.a"),
        (["jobs", "list", "--state", "lost"], None, "state"),
        (["jobs", "list", "--limit", "0"], None, "--limit"),
        (["nothing"], None, "nothing"),
        (["steer", "codec", "x.safetensors"], None, "--add BEHAVIOR"),
        (["encode", "codec", "nowhere.safetensors"], None, "nowhere.safetensors cannot be read"),
        (["artifacts", "put", "nowhere"], None, "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    cli: Cli, tmp_path: Path, arguments: list[str], yaml: str | None, says: str
) -> None:
    given = list(arguments)
    if yaml is not None:
        given += [write(tmp_path, yaml)] if arguments == ["pipeline"] else ["-f", write(tmp_path, yaml)]
    plain = cli(*given)
    assert plain.code == 2
    assert says in plain.err
    assert plain.out == ""
    answer = cli(*given, "--json")
    assert answer.code == 2
    assert answer.json["error"]["reason"] == "INVALID_INPUT"


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "get", "job_none"],
        ["jobs", "watch", "job_none"],
        ["artifacts", "get", "0" * 64],
        ["artifacts", "get", "job_none/zoo"],
        ["artifacts", "ls", "--job", "job_none"],
        ["models", "get", "none"],
        ["models", "behaviors", "none"],
        ["models", "publish", "x", "0" * 64],
        ["kinds", "none"],
    ],
)
def test_what_does_not_exist_is_exit_code_1(cli: Cli, arguments: list[str]) -> None:
    assert cli(*arguments).code == 1
    assert cli(*arguments, "--json").json["error"]["reason"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["watch", "job_abc"], "No such command 'watch'; did you mean jobs watch?"),
        (["put", "zoo"], "did you mean artifacts put?"),
        (["publish", "m", "x"], "did you mean models publish?"),
        (["jobs", "gett", "job_abc"], "Did you mean 'get'?"),
        (["artifacts", "ls", "job_abc"], "did you mean --job job_abc?"),
        (["jobs", "list", "generation"], "options that take a value: --kind, --state,"),
        (["submit", "genration"], "did you mean generation?"),
        (["kinds", "genration"], "did you mean generation?"),
        (["submit", "generation", "--set", "subjcts=3"], "spec.subjcts: there is no such field; did you mean subjects"),
        (
            ["submit", "clt", "--set", "training.step=3"],
            "spec.training.step: there is no such field; did you mean steps",
        ),
        (
            ["submit", "clt"],
            "spec.activations: is missing; give it with --set activations.job=JOB --set activations.artifact",
        ),
        (["submit", "sae"], "spec.hook: is missing; give it with --set hook=VALUE, or in the file"),
        (["submit", "generation", "-f", "README.md"], "README.md, line 6: this is not the YAML or JSON of a spec"),
    ],
)
def test_what_is_nearly_right_is_told_how_to_write_it(cli: Cli, arguments: list[str], says: str) -> None:
    answer = cli(*arguments)
    assert answer.code in (1, 2) and says in " ".join(answer.err.split())


def test_in_a_pipeline_missing_inputs_are_told_with_their_paths(cli: Cli, tmp_path: Path) -> None:
    answer = cli("pipeline", write(tmp_path, "jobs: {c: {kind: crossmodal, spec: {}, label: {}}}\n"))
    said = " ".join(answer.err.split())
    assert "--set jobs.c.spec.zoo.job=JOB --set jobs.c.spec.zoo.artifact=NAME" in said
    assert "jobs.c.label: there is no such field; did you mean labels?" in said


def test_over_rest_a_missing_input_is_told_as_json(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r'^spec\.zoo: is missing; give \{"job": "job_\.\.\.", "artifact": NAME\}'):
        client.submit("crossmodal", {})


def test_the_name_of_a_job_in_place_of_its_id_is_told_its_id(cli: Cli) -> None:
    id = cli("submit", "generation", "--name", "my-zoo", *IDLE, "--json").json["id"]
    for command in (["jobs", "get"], ["jobs", "watch"], ["jobs", "cancel"], ["jobs", "logs"]):
        assert f"did you mean {id}, which has the name my-zoo?" in " ".join(cli(*command, "my-zoo").err.split())
    for arguments in (["artifacts", "get", "my-zoo/zoo"], ["artifacts", "ls", "--job", "my-zoo"]):
        assert f"did you mean {id}" in " ".join(cli(*arguments).err.split())
    assert "`ethogram jobs list` has ids" in " ".join(cli("jobs", "get", "nobody").err.split())


def test_several_wrong_fields_are_all_listed(cli: Cli, tmp_path: Path) -> None:
    answer = cli("submit", "generation", "-f", write(tmp_path, "subjects: 0\nseed: -1\nnothing: 1\n"))
    assert all(f"spec.{name}: " in answer.err for name in ("subjects", "seed", "nothing"))
    assert "spec.subjects: must be greater than or equal to 1" in answer.err
    assert "spec.nothing: there is no such field" in answer.err
    assert answer.err.count("spec.subjects: ") == 1


def test_a_pipeline_given_as_a_spec_is_said_to_be_one(cli: Cli, tmp_path: Path) -> None:
    answer = cli("submit", "generation", "-f", write(tmp_path, "jobs:\n  zoo: {kind: generation}\n"))
    assert answer.code != 0
    assert "is a pipeline" in answer.err and "`ethogram pipeline`" in answer.err


def test_mappings_are_json_in_a_pipe_and_lines_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"job": "job_abc", "spec": {"subjects": 7, "training": {"learning_rate": 3e-4}}, "inputs": {}}
    pairs(fields)
    assert '{"subjects": 7, "training": {"learning_rate": 0.0003}}' in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pairs(fields)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["job", "job_abc"], ["spec.subjects", "7"], ["spec.training.learning_rate", "0.0003"]]


def test_artifacts_and_models_go_round(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    made = cli("artifacts", "put", str(tmp_path / "in"), "--name", "c", "--type", "codec", "--json").json
    assert made["id"] in cli("artifacts", "ls", "--type", "codec").out
    got = cli("artifacts", "get", made["id"], "-o", str(tmp_path / "out"), "--json").json
    assert got["files"] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert cli("models", "publish", "cli", made["id"], "--json").json["version"] == "1"
    assert made["id"] in cli("models", "get", "cli").out
    assert "cli" in cli("models", "ls").out
    assert cli("models", "publish", "cli", made["id"], "--version", "1").code == 1


def test_networks_without_a_model_are_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "n.safetensors"
    save_file({"layers.0.weight": np.zeros((2, 1, 3), np.float32), "layers.0.bias": np.zeros((2, 1), np.float32)}, file)
    for command in (["encode"], ["evaluate"], ["steer", "--add", "palindrome"]):
        answer = cli(*command[:1], "none", str(file), *command[1:])
        assert answer.code == 1
        assert "none" in answer.err
    # Networks are no latents.
    assert cli("decode", "none", str(file)).code == 2


def test_the_kinds_and_their_fields(cli: Cli, platform: Platform) -> None:
    assert "crossmodal" in cli("kinds").out
    assert cli("kinds", "--url", platform.url, "--json").json == cli("kinds", "--json").json
    shown = cli("kinds", "generation").out
    assert "training.learning_rate" in shown
    assert "patterns.N.name" in shown
    assert cli("kinds", "generation", "--json").json["schema"]["properties"]["subjects"]["default"] == 2048


def test_no_platform_is_exit_code_1_and_says_what_to_do(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = cli("jobs", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert (answer.code, "is it running?" in answer.err) == (1, True)
    monkeypatch.delenv("ETHOGRAM_URL")
    monkeypatch.setenv("ETHOGRAM_STATE", str(tmp_path))
    answer = cli("jobs", "list")
    assert (answer.code, "ethogram up" in answer.err) == (1, True)


@pytest.mark.parametrize(
    "command",
    [
        *("up", "demo", "doctor", "run", "submit", "pipeline", "kinds", "encode", "steer", "decode", "evaluate"),
        *("embed", "describe", "recommend"),
        *(f"jobs {name}" for name in ("list", "get", "watch", "logs", "cancel", "retry")),
        *(f"artifacts {name}" for name in ("put", "ls", "get")),
        *(f"models {name}" for name in ("publish", "ls", "get", "behaviors")),
    ],
)
def test_every_command_has_help_with_examples_and_json(cli: Cli, command: str) -> None:
    answer = cli(*command.split(), "--help")
    assert answer.code == 0
    assert f"$ ethogram {command}" in answer.out
    assert "--json" in answer.out


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = """
import sys
from ethogram.cli.main import run
try:
    run(["--help"])
except SystemExit:
    pass
print(sorted({"httpx", "grpc", "numpy", "ruamel.yaml", "torch"} & set(sys.modules)), file=sys.stderr)
"""
    costs = []
    for _ in range(3):
        # Processor time: the machine may be busy with other tests.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stderr.strip() == "[]"
    assert min(costs) < 0.5


def test_a_reader_that_leaves_is_no_failure_to_shout_about(platform: Platform) -> None:
    ethogram = f"{sys.executable} -c 'from ethogram.cli.main import run; run()'"
    command = f"{ethogram} kinds generation --json --url {platform.url} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_limits_and_children_are_shown(cli: Cli, client: Client) -> None:
    limits = ("--time-limit", "1.5h", "--stall-limit", "none", "--max-attempts", "7")
    job = client.job(cli("submit", "generation", *IDLE, *limits, "--json").json["id"])
    assert (job.time_limit_seconds, job.stall_limit_seconds, job.max_attempts) == (5400.0, None, 7)
    assert "time limit  5400 s" in cli("jobs", "get", job.id).out
    assert cli("jobs", "list", "--parent", job.id, "--json").json == []
    assert client.dry_run("generation", {})["kind"] == "generation"
    cli("jobs", "cancel", job.id)
    assert cli("jobs", "retry", job.id, "--from-start", "--json").json["state"] == "QUEUED"
    cli("jobs", "cancel", job.id)


@pytest.mark.parametrize("given", ["0", "-3", "3x", "", "1e3", "inf"])
def test_a_limit_that_is_no_time(cli: Cli, given: str) -> None:
    answer = cli("submit", "generation", *IDLE, f"--time-limit={given}")
    assert answer.code == 2
    assert "30m" in answer.err


def test_logs_are_followed_from_their_tail(platform: Platform, client: Client, cli: Cli) -> None:
    job = client.submit("generation", {"subjects": 8, "min_accuracy": 0.3, "training": {"steps": 20}})
    client.wait(job.id).check()
    whole = cli("jobs", "logs", job.id).out.splitlines()
    assert len(whole) > 1
    assert cli("jobs", "logs", job.id, "--tail", "1").out.splitlines() == whole[-1:]
    assert cli("jobs", "logs", job.id, "-f", "--tail", "1").out.splitlines() == whole[-1:]
    assert cli("jobs", "logs", job.id, "-n", "0").out == ""
    assert cli("jobs", "logs", job.id, "-f", "--tail", "999").out.splitlines() == whole


def test_control_c_leaves_quietly(platform: Platform, client: Client) -> None:
    job = client.submit("generation", {}, queue="nobody")
    # Where these tests run in the background of a shell, what they start ignores the signal.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = [sys.executable, "-c", f"{heeds}; from ethogram.cli.main import run; run()"]
    command = [*program, "jobs", "watch", job.id, "--json", "--url", platform.url]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["type"] == "state"
    following.send_signal(signal.SIGINT)
    assert following.communicate(timeout=10) == (b"", b"")
    assert following.returncode == 130
    client.cancel(job.id)
