"""`eopc serve`: a bundle over OpenAI's API, with a joule budget on every request."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from eopc_runtime.cli.meters import meter_options
from eopc_runtime.cli.output import print_json
from eopc_runtime.cli.runners import key_option, runner_option, show_notes


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another one needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of keys, one a line, of which clients send one; EOPC_API_KEY is a key too.",
)
@click.option("--budget", metavar="ENERGY", help="Budget of requests that name none. [default: no limit]")
@click.option("--max-budget", metavar="ENERGY", help="Most that a request may have. [default: no limit]")
@click.option(
    "--allowance",
    multiple=True,
    metavar="ENERGY/PERIOD",
    help="Joules allowed over time, for example 2Wh/day or 500J/minute (minute, hour, day); may be given again.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("allowance.json"),
    show_default=True,
    metavar="FILE",
    help="Where it is kept how much of the allowances is spent.",
)
@click.option(
    "--max-running", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences that take turns."
)
@click.option(
    "--max-waiting", type=click.IntRange(min=0), default=32, show_default=True, help="Sequences that wait beside them."
)
@click.option(
    "--max-body",
    type=click.IntRange(min=1),
    default=1 << 20,
    show_default=True,
    metavar="BYTES",
    help="Largest request body.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long running sequences may take after SIGTERM.",
)
@click.option("--name", help="Name of the model in the API. [default: that of the bundle's folder]")
@meter_options(
    "none",
    "none",
    text="What corrects the account while a sequence runs; sequences then run one after the other. [default: none]",
)
@runner_option
@key_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: onnxruntime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the address, once it listens.")
def serve(
    bundle: str,
    host: str,
    port: int,
    api_key: Path | None,
    budget: str | None,
    max_budget: str | None,
    allowance: tuple[str, ...],
    state: Path,
    max_running: int,
    max_waiting: int,
    max_body: int,
    grace: float,
    name: str | None,
    meter: str | None,
    proxy_w: float | None,
    runner: str,
    key: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Serve BUNDLE over OpenAI's API, with a live page at /.

    Requests may carry "energy_budget_j"; answers tell their joules in "usage". SIGTERM finishes what runs.
    """
    from eopc_runtime.allowance import BudgetPolicy
    from eopc_runtime.cli.meters import meter_of_run, prices_here
    from eopc_runtime.errors import BudgetError
    from eopc_runtime.scheduler import Scheduler
    from eopc_runtime.serve.app import make_app
    from eopc_runtime.serve.gate import check_host, read_keys
    from eopc_runtime.serve.run import bind
    from eopc_runtime.serve.run import serve as run_server
    from eopc_runtime.serve.service import Limits, Service
    from eopc_runtime.session import Session
    from eopc_runtime.units import format_energy, parse_energy
    from eopc_runtime.windows import Allowance

    keys = read_keys(api_key)
    check_host(host, keys)
    limits = Limits(
        budget_j=None if budget is None else parse_energy(budget),
        max_budget_j=None if max_budget is None else parse_energy(max_budget),
        max_body_bytes=max_body,
    )
    if limits.budget_j is not None and limits.max_budget_j is not None and limits.budget_j > limits.max_budget_j:
        raise BudgetError(f"--budget {budget} is above --max-budget {max_budget}. Lower it, or raise the other.")
    allowances = [Allowance.parse(text) for text in allowance]
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(bundle, threads=threads, runner=runner, key=key))
        chosen = session.runner
        opened = meter_of_run(session.bundle, meter, True, proxy_w, on_gpu=chosen is not None and chosen.on_gpu)
        if opened is not None:
            stack.enter_context(opened)
        rails = None if opened is None else opened.sensor.rails
        table, warning = prices_here(session.bundle, threads, rails, False, chosen)
        session.use(meter=opened, table=table)
        session.pool.get(session.tiers[0])  # say now, not to the first client, what does not load
        session.keep_loaded()
        policy = stack.enter_context(BudgetPolicy(allowances, state if allowances else None))
        listener = stack.enter_context(bind(host, port))
        scheduler = stack.enter_context(Scheduler(session, max_running=max_running, max_waiting=max_waiting))
        service = Service(scheduler, policy, name or Path(bundle).resolve().name.removesuffix(".eopc"), limits)
        if warning:
            click.echo(f"Warning: {warning}", err=True)
        show_notes(session.notes)
        for left in policy.left():
            click.echo(f"Allowance: {format_energy(left.left_j)} of {left.allowance} left.", err=True)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        click.echo(f"Serving {service.name} ({table.source} joules) on {url}", err=True)
        if as_json:
            print_json({"url": url, "models": service.models(), "energy_source": table.source})
        run_server(make_app(service, keys), service, listener, grace)
        click.echo("Stopped.", err=True)
