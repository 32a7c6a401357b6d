"""The device owner's commands: update, serve, and look after what is installed."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pitstop.cli.frame import DEVICE, DEVICE_ROOT, MORE, STDOUT, Channel, Device, Json, Profile, app, finish, needs
from pitstop.errors import Refused, UsageError


@app.command(rich_help_panel=DEVICE)
def update(
    url: Annotated[str, typer.Argument(metavar="URL", help="The repository: an http(s) address or a folder.")],
    device: Device = DEVICE_ROOT,
    root: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The publisher's 1.root.json; needed the first time.")
    ] = None,
    channel: Channel = "stable",
    json: Json = None,
) -> None:
    """Fetch, verify, try and activate what a channel offers."""
    from pitstop.device import health, updater
    from pitstop.device.store import Store

    result = updater.update(device, url, root_json=_read(root) if root else None, channel=channel)
    probes: list[health.Probe] = []
    active = updater.activate(Store(device), lambda release: probes.append(health.probe(release)))
    if active is None or active.sha256 != result.release:
        raise Refused(
            f"release {result.release[:12]} was tried as often as it may be, and never proved itself",
            where=device,
            cure="what served before still does; ask the publisher for a repaired release",
        )
    offers = ", ".join(f"{bundle.name} {bundle.version}" for bundle in result.bundles)
    said = f"{result.fetched_bytes / 1e6:,.1f} MB fetched, tried, now active" if probes else "up to date"
    finish({"update": result, "probes": probes}, f"{device}: {said}: {offers}", json)


@app.command(rich_help_panel=DEVICE)
def status(device: Device = DEVICE_ROOT, json: Json = None) -> None:
    """Show what is installed, active and bad."""
    from pitstop.device.store import Store

    store = Store(device)
    release = store.active()
    bundles = sorted(release.bundles.values(), key=lambda bundle: bundle.kind != "base") if release else []
    active = {bundle.name: bundle.version for bundle in bundles}
    lines = [f"{device}: {', '.join(f'{name} {version}' for name, version in active.items()) or 'nothing is active'}"]
    for what, digests in (
        ("on trial", [store.state.trial]),
        ("before", [store.state.previous]),
        ("bad", store.state.bad),
    ):
        lines += [f"  {what}: release {digest[:12]}" for digest in digests if digest]
    finish({"active": active, "state": store.state}, "\n".join(lines), json)


@app.command(rich_help_panel=DEVICE)
def rollback(device: Device = DEVICE_ROOT, json: Json = None) -> None:
    """Go back to the release before."""
    from pitstop.device.store import Store

    Store(device).roll_back()
    status(device, json)


@app.command(rich_help_panel=DEVICE)
def serve(
    device: Device = DEVICE_ROOT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients must send the key in this file.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let other machines in without a key.")] = False,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let pages from there use it in a browser; repeatable.")
    ] = None,
    web: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Offer the page for phones that `pitstop web` wrote there.")
    ] = None,
    profile: Profile = None,
    engine: Annotated[
        Literal["llama", "onnx"] | None, typer.Option(help="Which must run it. [that of the release's format]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine. [all cores]")] = None,
    own_lanes: Annotated[
        int, typer.Option(min=0, help="Adapters with conversations of their own: faster, as memory allows.")
    ] = 4,
    parked_mb: Annotated[int, typer.Option(min=0, help="Memory for conversations that make room for others.")] = 64,
    parked_disk_mb: Annotated[int, typer.Option(min=0, help="Disk for those beyond that.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Say in JSON when it is ready.")] = False,
) -> None:
    """Serve OpenAI's API: every adapter is a model name."""
    with needs("device", "serving"):
        from pitstop.device import server as stage
        from pitstop.device.request import Limits
    limits = Limits(
        threads=threads,
        own_lanes=own_lanes,
        parked_memory=parked_mb << 20,
        parked_disk=parked_disk_mb << 20,
        parked_folder=device / "parked",
    )
    stage.serve(
        device,
        host=host,
        port=port,
        limits=_within(profile, device, limits),
        engine=engine,
        api_key_file=api_key_file,
        no_auth=no_auth,
        cors=cors or (),
        page=web,
        as_json=json,
    )


@app.command(rich_help_panel=DEVICE)
def web(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that a host will offer.")],
    repository: Annotated[
        str, typer.Option(metavar="URL|FOLDER", help="An http(s) address, or a folder inside of OUT.")
    ],
    root: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The publisher's 1.root.json. [the folder's]")
    ] = None,
    channel: Channel = "stable",
    profile: Annotated[str, typer.Option(metavar="BOARD", help="Whose memory and context length it keeps to.")] = (
        "phone-browser"
    ),
    json: Json = None,
) -> None:
    """Write the page that fetches, verifies and runs bundles on a phone."""
    from pitstop.device import web as stage

    written = stage.web(out, repository, root_json=root, channel=channel, profile=profile)
    said = f"{out}: the page for {written.repository}, channel {channel}; offer it with https, or on localhost"
    finish(written, said, json)


@app.command(rich_help_panel=DEVICE)
def chat(
    device: Device = DEVICE_ROOT,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="NAME", help="Who answers. [the base]")
    ] = None,
    profile: Profile = None,
) -> None:
    """Talk in the terminal; /swap NAME changes the adapter."""
    with needs("llama", "running a model"):
        from pitstop.device import chat as stage
        from pitstop.device.request import Limits
    stage.chat(device, adapter, limits=_within(profile, device, Limits()))


@app.command(rich_help_panel=DEVICE)
def bench(
    device: Device = DEVICE_ROOT,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of threads to try; repeatable. [1, 2, 4 … all cores]")
    ] = None,
    json: Json = None,
) -> None:
    """Measure speed, memory and swaps on this board."""
    from pitstop.device import bench as stage
    from pitstop.device.runtime import active_release

    with needs("llama", "running a model"):
        measured = stage.bench(active_release(device), threads or stage.thread_counts())
    if json != STDOUT:
        stage.describe(measured)
    if json is not None:
        finish(measured, f"written to {json}", json)


def _within(profile: str | None, device: Path, limits: Any) -> Any:
    """Return limits lowered to what a board's profile allows."""
    if profile is None:
        return limits
    from pitstop import profiles
    from pitstop.device.engine import check_engine
    from pitstop.device.limits import within
    from pitstop.device.runtime import active_release

    release = active_release(device)
    board = profiles.load(profile)
    check_engine(release, profile=board)
    merged = [bundle.size for bundle, _ in release.adapters().values() if bundle.merged]
    return within(board, release.base_path(), limits, merged=merged, format=release.base.artifact.format)


@app.command("doctor", rich_help_panel=MORE)
def examine(json: Json = None) -> None:
    """Say what is installed, what is missing and what to type."""
    from pitstop import doctor

    diagnosis = doctor.examine()
    finish(diagnosis, doctor.describe(diagnosis), json)
    if diagnosis.problems:
        raise typer.Exit(UsageError.exit_code)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
