"""Commands about the platform itself: up, demo, doctor, kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli.options import Answer, Json, State, command, connect, examples
from ethogram.cli.output import console, pairs, print_json, say, table
from ethogram.errors import EthogramError, NotFound, did_you_mean
from ethogram.platform.state import PORT, StateDir

app = typer.Typer()


@app.command(epilog=examples("ethogram up", "ethogram up --state ~/zoos --port 9000", "ethogram up --port 0 --json"))
def up(
    state: State = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the gateway; 0: any free one.")] = PORT,
    as_json: Json = False,
) -> None:
    """Run the whole platform on this machine until Ctrl-C."""
    import signal
    import threading

    from ethogram.platform.stack import Platform

    platform = Platform(StateDir.find(state), port=port, say=say)
    leave = threading.Event()

    def ask(*_: object) -> None:
        if leave.is_set():
            raise KeyboardInterrupt
        leave.set()
        platform.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask)
    try:
        platform.start()
    except EthogramError:
        if leave.is_set():
            return
        raise
    where: dict[str, Any] = {
        "url": platform.url,
        "docs": f"{platform.url}/docs",
        "inference": platform.inference,
        "state": str(platform.state.root),
        "logs": {name: str(child.log) for name, child in platform.children.items()},
        "seconds": round(platform.seconds["platform"], 2),
    }
    try:
        if as_json:
            print_json(where, indent=None)
        else:
            pairs(where | {"logs": "  ".join(where["logs"].values())})
            say("Press Ctrl-C to stop.")
        leave.wait()
        say("Stopping. Running jobs are checkpointed, and resume when the platform is up again.")
    finally:
        try:
            platform.stop()
        except KeyboardInterrupt:
            platform.stop(hurry=True)


@app.command(epilog=examples("ethogram demo --quick", "ethogram demo --output runs/demo --fresh"))
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Use small sizes; takes about a minute.")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore earlier results.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make a zoo, train a codec, serve it, steer held-out networks, and show that their behaviour changed.

    Uses the platform that runs in the state directory, or starts one until the end.
    """
    from ethogram.demo import run

    report = run(output, quick=quick, fresh=fresh, state=state, quiet=as_json)
    if as_json:
        print_json(report)


@command(app, "ethogram doctor", "ethogram doctor --json")
def doctor(state: State = None) -> Answer:
    """Check this machine for what the platform needs, and say what to do; exit code 1 if something is missing."""
    from ethogram.platform.doctor import examine

    findings = examine(StateDir.find(state))

    def show() -> None:
        out = console()
        for finding in findings:
            mark, style = ("ok", "") if finding.ok else ("no", "bold red")
            out.print(f"{mark}  {finding.name:<8} {finding.found}", style=style)
            if not finding.ok:
                out.print(f"             {finding.advice}")

    return Answer([finding._asdict() for finding in findings], show, ok=all(finding.ok for finding in findings))


@command(app, "ethogram kinds", "ethogram kinds generation", "ethogram kinds generation --json")
def kinds(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="Show the fields of this kind's spec.")] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask the platform at this URL, which may be of another version.")
    ] = None,
) -> Answer:
    """List the kinds of jobs, or the fields of one kind's spec with their bounds, defaults and meaning. No platform is
    needed."""
    from ethogram.resources import Kind
    from ethogram.schema import fields

    if url is None:
        from ethogram.specs.kinds import KINDS

        kinds = [
            Kind(name=kind.name, summary=kind.summary, queue=kind.queue, schema=kind.spec.model_json_schema())
            for kind in KINDS.values()
        ]
    else:
        with connect(url) as client:
            kinds = client.kinds()
    if kind is None:
        rows = [(known.name, known.queue, known.summary) for known in kinds]
        return Answer(kinds, lambda: table(["Kind", "Queue", "Summary"], rows))
    chosen = next((known for known in kinds if known.name == kind), None)
    if chosen is None:
        names = [known.name for known in kinds]
        raise NotFound(f"there is no kind {kind!r}; there are: {', '.join(names)}{did_you_mean(kind, names)}")
    described = fields(chosen.spec_schema)
    return Answer(chosen, lambda: table(["Field", "Type", "Default", "Meaning"], described))
