"""The SDK against a real platform."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path

import psutil
import pytest

from ethogram.aio import AsyncClient
from ethogram.client import Client
from ethogram.errors import Conflict, Forbidden, IllegalState, InvalidInput, NotFound, Unavailable
from ethogram.platform.stack import Platform, free_port
from ethogram.resources import Event, Job
from ethogram.specs.generation import GenerationSpec

# No worker serves this queue, so that a job stays as it is.
IDLE = "nobody"


def test_a_job_is_submitted_found_and_cancelled(client: Client) -> None:
    job = client.submit("generation", {"subjects": 3}, queue=IDLE, priority=2, labels={"name": "found"})
    assert (job.state, job.queue, job.priority, job.labels) == ("QUEUED", IDLE, 2, {"name": "found"})
    assert job.spec["subjects"] == 3
    assert client.job(job.id) == job
    assert job in client.jobs(kind="generation", state="QUEUED")
    assert [found.id for found in client.jobs(labels={"name": "found"}, limit=None)] == [job.id]
    assert client.cancel(job.id).state == "CANCELLED"
    seen: list[Event] = []
    done = client.wait(job.id, on_event=seen.append)
    assert done.terminal
    assert [event.type for event in seen][-1] == "state"
    assert [event.seq for event in seen] == sorted({event.seq or 0 for event in seen})
    with pytest.raises(IllegalState, match="CANCELLED"):
        done.check()


def test_a_spec_object_is_as_good_as_a_mapping(client: Client) -> None:
    spec = GenerationSpec(subjects=5)
    assert client.dry_run("generation", spec)["spec"] == client.dry_run("generation", {"subjects": 5})["spec"]


def test_pages_are_followed_to_the_end(client: Client) -> None:
    made = [client.submit("generation", {}, queue=IDLE, labels={"many": "yes"}).id for _ in range(7)]
    assert [job.id for job in client.jobs(labels={"many": "yes"}, limit=3)] == made[::-1][:3]
    assert [job.id for job in client.jobs(labels={"many": "yes"}, limit=None)] == made[::-1]
    for id in made:
        client.cancel(id)


def test_the_same_key_returns_the_same_job_and_another_body_is_refused(client: Client) -> None:
    first = client.submit("generation", {"seed": 1}, queue=IDLE, idempotency_key="once")
    assert client.submit("generation", {"seed": 1}, queue=IDLE, idempotency_key="once").id == first.id
    with pytest.raises(Conflict):
        client.submit("generation", {"seed": 2}, queue=IDLE, idempotency_key="once")
    client.cancel(first.id)


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("nothing", {}, "kind"),
        ("generation", {"unknown": 1}, "spec.unknown"),
        ("generation", {"subjects": "3"}, "spec.subjects"),
        ("generation", {"subjects": 0}, "spec.subjects"),
        ("generation", {"training": {"learning_rate": float("nan")}}, "spec.training.learning_rate"),
        ("generation", {"patterns": [{"name": "none"}]}, "spec.patterns.0.name"),
        ("crossmodal", {}, "spec.zoo"),
    ],
)
def test_a_wrong_submission_names_the_field(client: Client, kind: str, spec: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.submit(kind, spec)
    assert any(violation.field.startswith(field) for violation in caught.value.violations)


def test_what_does_not_exist_is_not_found(client: Client, tmp_path: Path) -> None:
    for ask in (
        lambda: client.job("job_none"),
        lambda: list(client.events("job_none")),
        lambda: client.cancel("job_none"),
        lambda: client.artifact("0" * 64),
        lambda: client.get("0" * 64, tmp_path),
        lambda: client.model("none"),
        lambda: client.publish("none", "0" * 64),
        lambda: client.submit("crossmodal", {"zoo": {"job": "job_none", "artifact": "zoo"}}),
        lambda: client.output("job_none", "zoo"),
    ):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(InvalidInput):
        client.job("..")


def test_a_pipeline_is_queued_whole_or_not_at_all(client: Client) -> None:
    plan = {
        "zoo": {"kind": "generation", "spec": {}, "queue": IDLE, "labels": {"plan": "good"}},
        "codec": {"kind": "crossmodal", "spec": {"zoo": {"job": "zoo", "artifact": "zoo"}}, "queue": IDLE},
    }
    made = client.pipeline(plan)
    assert made["codec"].waits_for == [made["zoo"].id]
    assert client.cancel(made["zoo"].id).terminal
    assert client.wait(made["codec"].id).state == "CANCELLED"
    plan["codec"]["spec"] = {"zoo": {"job": "elsewhere", "artifact": "zoo"}}
    plan["zoo"]["labels"] = {"plan": "bad"}
    with pytest.raises((InvalidInput, NotFound)):
        client.pipeline(plan)
    assert client.jobs(labels={"plan": "bad"}) == []


def test_artifacts_go_up_and_come_down_unchanged(client: Client, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a b.txt").write_text("one")
    (source / "deep" / "ü.bin").write_bytes(os.urandom(300_000))
    made = client.put(source, name="things", type="file")
    assert client.put(source, name="things", type="file").manifest is not None
    assert made.id in [artifact.id for artifact in client.artifacts(type="file", limit=None)]
    came: list[int] = []
    folder = client.get(made.id, tmp_path / "copy", on_bytes=came.append)
    assert sum(came) == made.size == 300_003
    for file in ("a b.txt", "deep/ü.bin"):
        assert (folder / file).read_bytes() == (source / file).read_bytes()
    # What is there already is kept, and something else is never replaced.
    kept = (folder / "a b.txt").stat().st_mtime_ns
    (folder / "deep" / "ü.bin").unlink()
    client.get(made.id, folder)
    assert (folder / "a b.txt").stat().st_mtime_ns == kept
    assert (folder / "deep" / "ü.bin").read_bytes() == (source / "deep" / "ü.bin").read_bytes()
    assert not list(folder.rglob("*.part"))
    (folder / "a b.txt").unlink()
    (folder / "deep" / "ü.bin").write_bytes(b"mine")
    with pytest.raises(Conflict, match=r"ü\.bin exists already"):
        client.get(made.id, folder)
    assert (folder / "deep" / "ü.bin").read_bytes() == b"mine" and not (folder / "a b.txt").exists()
    with pytest.raises(Conflict, match="is not a folder"):
        client.get(made.id, source / "a b.txt")


def test_links_are_followed_and_what_is_no_file_is_named(client: Client, tmp_path: Path) -> None:
    other, mine = tmp_path / "other disk", tmp_path / "mine"
    for folder in (other, mine):
        folder.mkdir()
    (other / "far.txt").write_text("far")
    (mine / "near.txt").write_text("near")
    (mine / "linked").symlink_to(other)
    (mine / "one.txt").symlink_to(other / "far.txt")
    made = client.put(mine, name="links", type="file")
    assert made.manifest is not None and set(made.manifest.files) == {"near.txt", "one.txt", "linked/far.txt"}
    odd = mine / "odd"
    for target, why in (
        (tmp_path / "nothing", "a link that leads nowhere"),
        (None, "neither a file nor a folder"),
        (mine, "a link to a folder that it is in"),
    ):
        if target is None:
            os.mkfifo(odd)
        else:
            odd.symlink_to(target)
        with pytest.raises(InvalidInput, match=f"{odd} is {why}"):
            client.put(mine, name="links", type="file")
        odd.unlink()


def test_a_single_file_is_an_artifact_too_and_nothing_is_none(client: Client, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("n")
    made = client.put(tmp_path / "notes.txt", name="notes", type="file")
    assert made.manifest is not None
    assert list(made.manifest.files) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InvalidInput, match="path"):
            client.put(path, name="x", type="file")


def test_a_folder_may_hold_more_files_than_may_be_open(client: Client, tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}").write_bytes(b"%d" % i * (i + 1) * (70 if i % 50 == 0 else 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 25, limits[1]))
    try:
        made = client.put(tmp_path, name="many", type="folder")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert made.manifest is not None
    wanted = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    assert {name: file.sha256 for name, file in made.manifest.files.items()} == wanted


def test_models_are_published_once_for_each_version(client: Client, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    artifact = client.put(tmp_path, name="codec", type="codec").id
    assert client.publish("sdk", artifact).version == "1"
    assert client.publish("sdk", artifact, "best").version == "best"
    with pytest.raises(Conflict):
        client.publish("sdk", artifact, "best")
    assert client.model("sdk", "1").artifact == artifact
    assert {model.version for model in client.models() if model.name == "sdk"} == {"1", "best"}


def test_kinds_and_info(client: Client, platform: Platform) -> None:
    assert {kind.name for kind in client.kinds()} >= {"generation", "crossmodal"}
    assert all("properties" in kind.spec_schema for kind in client.kinds())
    assert client.info()["inference"] == platform.inference


def test_a_client_finds_its_platform(platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ETHOGRAM_URL", raising=False)
    assert Client(state=platform.state.root).url == platform.url
    monkeypatch.setenv("ETHOGRAM_STATE", str(platform.state.root))
    assert Client().url == platform.url
    monkeypatch.setenv("ETHOGRAM_URL", "http://127.0.0.1:1/")
    assert Client().url == "http://127.0.0.1:1"
    monkeypatch.delenv("ETHOGRAM_URL")
    with pytest.raises(Unavailable, match="ethogram up"):
        Client(state=tmp_path)
    with pytest.raises(InvalidInput, match="http://HOST:PORT"):
        Client("localhost:8000")


def test_a_proxy_of_the_environment_is_no_way_to_loopback(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert Client(platform.url).info()


def test_a_platform_that_does_not_answer_is_said() -> None:
    with pytest.raises(Unavailable, match=r"does not answer .* is it running\?"):
        Client(f"http://127.0.0.1:{free_port()}", retry_seconds=0.3).jobs()


def test_a_failed_job_raises_why() -> None:
    error = {"reason": "INVALID_INPUT", "message": "no", "violations": [{"field": "zoo", "description": "no"}]}
    job = Job(id="job_x", kind="generation", spec={}, state="FAILED", error=error)
    with pytest.raises(InvalidInput, match="generation job job_x failed: no") as caught:
        job.check()
    assert caught.value.violations[0].field == "zoo"


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080/"),
        ("all_proxy", "socks5://127.0.0.1:1080"),
        ("HTTP_PROXY", "socks4://name:secret@proxy.example:1080"),
        ("http_proxy", "http://name:secret@proxy.example:port"),
        ("HTTP_PROXY", "proxy.example:99999"),
        ("HTTP_PROXY", "http://"),
        ("ALL_PROXY", "[::1"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    for client in (Client, AsyncClient):
        with pytest.raises(InvalidInput, match=f"^{variable}: .* cannot be used as a proxy .*NO_PROXY$") as caught:
            client("http://zoos.example")
        assert "secret" not in caught.value.message


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://127.0.0.1:8321", ""),
        ("http://127.9.9.9:8321", ""),
        ("http://[::1]:8321", ""),
        ("http://localhost:8321", ""),
        ("http://zoos.example", "*"),
        ("http://zoos.example", " other.example , .example"),
        ("http://zoos.example", "zoos.example"),
        ("http://zoos.example:8321", "zoos.example:8321"),
        ("http://10.1.2.3:8321", "localhost,10.0.0.0/8"),
        ("http://10.1.2.3", "10.1.2.3"),
        ("http://[fd00::7]:8321", "fd00::/8"),
        ("http://[fd00::7]:8321", "[fd00::7]"),
    ],
)
def test_a_proxy_that_is_not_used_does_no_harm(url: str, no_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    Client(url).close()


@pytest.mark.usefixtures("no_proxies")
def test_the_proxy_of_the_scheme_is_used(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform itself stands in for a proxy: it says that it is not the host that it is asked for."""
    monkeypatch.setenv("HTTPS_PROXY", "socks://127.0.0.1:1080/")
    monkeypatch.setenv("HTTP_PROXY", platform.url.removeprefix("http://"))
    monkeypatch.setenv("NO_PROXY", "elsewhere.example,,[::1],192.168.0.0/16,bad/99")
    with (
        Client("http://zoos.example:9", retry_seconds=0) as client,
        pytest.raises(Forbidden, match=r"'zoos\.example:9'"),
    ):
        client.info()


def test_certificates_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(InvalidInput, match=r"SSL_CERT_FILE: /nowhere/ca.pem holds no certificates"):
        Client("https://zoos.example")


def test_without_https_nothing_needs_certificates(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with Client(platform.url) as client:
        assert client.info()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    Client("http://zoos.example").close()
    monkeypatch.setenv("HTTP_PROXY", "https://127.0.0.1:9")
    with pytest.raises(InvalidInput, match="SSL_CERT_FILE: "):
        Client("http://zoos.example")
