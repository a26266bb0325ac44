"""`ninerank rank`: one request to a server, from a file, as a person would try it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ninerank.errors import RequestError

if TYPE_CHECKING:
    from ninerank.predictor.client import RankResult
    from ninerank.predictor.requestfile import RequestFile


def run(
    target: Annotated[str | None, typer.Option(help="Server, as host:port.")] = None,
    request: Annotated[Path | None, typer.Option(help="JSON file of the request; - reads standard input.")] = None,
    example: Annotated[Path | None, typer.Option(metavar="BUNDLE", help="Print a request made of this bundle's golden rows.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of the --example request.")] = 10,
    top_k: Annotated[int | None, typer.Option(min=0, help="Order only the best k; 0: all.")] = None,
    timeout_ms: Annotated[int | None, typer.Option(min=1, help="Give up after this many milliseconds.")] = None,
    tls: Annotated[bool, typer.Option(help="Connect over TLS.")] = False,
    ca: Annotated[Path | None, typer.Option(help="With --tls: PEM file of whoever signs the server's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option(help="With --tls: PEM file of this client's certificate.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --tls: PEM file of its key.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds this client's token and nothing else.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank one request, or print an example of one.

    ninerank rank --example BUNDLE > r.json; ninerank rank --target localhost:50051 --request r.json
    """
    from ninerank.predictor.requestfile import answer, example_request

    if example is not None:
        print(example_request(example, candidates).to_text())
        return
    if target is None or request is None:
        raise RequestError("--target and --request are needed (or --example BUNDLE, which prints a request)")
    from ninerank.predictor.client import ClientSecurity, PredictorClient

    asked = _read(request)
    token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    with PredictorClient(target, security=ClientSecurity(tls, ca, cert, key, token)) as client:
        result = client.rank(
            asked.user,
            asked.items,
            ids=asked.ids,
            top_k=asked.top_k if top_k is None else top_k,
            timeout_ms=timeout_ms or asked.timeout_ms,
            request_id=asked.request_id,
            model_name=asked.model,
            model_version=asked.version,
            tasks=asked.tasks,
            explain_top=asked.explain_top,
            priority=asked.priority,
            session=asked.session,
        )
    if as_json:
        print(json.dumps(answer(result, asked.ids), indent=1))
    else:
        _show(result, asked)


def _read(path: Path) -> "RequestFile":
    from ninerank.predictor.requestfile import RequestFile

    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: is not UTF-8 text ({error})") from None
    return RequestFile.from_text(text, str(path))


def _show(result: "RankResult", asked: "RequestFile") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("candidate" if asked.ids is None else "id")
    table.add_column("score", justify="right")
    for rank, index in enumerate(result.order.tolist(), start=1):
        known = index not in result.defaults_used.unknown_candidates
        name = str(index if asked.ids is None else asked.ids[index])
        table.add_row(str(rank), escape(name) + ("" if known else " [dim](unknown id)[/dim]"), f"{result.scores[index]:.6f}")
    console = Console(highlight=False)
    console.print(f"{result.model_name} {result.model_version}, request {result.request_id}", soft_wrap=True)
    console.print(table)
    timings = result.timings_us
    console.print(f"{timings['total']:,} us on the server, {timings['compute']:,} of them in the model", soft_wrap=True)
    columns = (*result.defaults_used.user_columns, *result.defaults_used.item_columns)
    if columns:
        console.print(f"[yellow]left out, so their defaults were used: {escape(', '.join(columns))}[/yellow]", soft_wrap=True)
