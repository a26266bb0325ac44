"""`ninerank serve`: a bundle behind a gRPC port."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.predictor.announcement import Announcement


def run(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Bundle that `ninerank export` wrote, or a folder or object store (URI) of models: <model>/<version>/.", show_default=False
        ),
    ],
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="gRPC port; 0: a free one.")] = 50051,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of them.")] = "127.0.0.1",
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP port of /metrics; 0: a free one. Default: none.")] = None,
    items: Annotated[Path | None, typer.Option(help="Parquet file of item features, so that requests may send ids alone.")] = None,
    item_key: Annotated[
        str | None,
        typer.Option(help="Column that candidate ids stand for, in --items too. Default: the item id of the sequences, item_id or item."),
    ] = None,
    users: Annotated[Path | None, typer.Option(help="Parquet file of user features, so that requests may send an id alone.")] = None,
    user_key: Annotated[str | None, typer.Option(help="Column of the user's id, in --users too. Default: user_id or user.")] = None,
    features: Annotated[
        str,
        typer.Option(help="Where features by id are kept: memory: (--items, --users), or redis://, redis-sentinel://, redis-cluster://..."),
    ] = "memory:",
    cache_mb: Annotated[int, typer.Option(min=1, help="Bound of the feature cache of items in MB.")] = 1024,
    user_cache_mb: Annotated[int, typer.Option(min=1, help="Bound of the feature cache of users in MB.")] = 256,
    cache_ttl: Annotated[float, typer.Option(min=0.001, help="Seconds until a row of a Redis is asked for anew.")] = 60.0,
    cache_max_stale: Annotated[float, typer.Option(min=0, help="Seconds beyond that for which it stands in if the Redis fails.")] = 3600.0,
    poll_seconds: Annotated[float, typer.Option(min=0.01, help="Between looks at a folder of models.")] = 1.0,
    keep: Annotated[int, typer.Option(min=0, max=16, help="Older versions of each model that stay loaded.")] = 0,
    model_copies: Annotated[Path | None, typer.Option(help="Where versions of an object store are copied to.")] = None,
    log_dir: Annotated[Path | None, typer.Option("--log", help="Directory of the request log (Parquet), for `ninerank replay`.")] = None,
    log_sample: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are logged.")] = 1.0,
    log_seconds: Annotated[float, typer.Option(min=0.1, help="Close a log file after this many seconds.")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, max=256, help="Processes that serve; the most requests a second: one a core.")] = 1,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Threads of a process that compute; 0: its event loop does.")] = 0,
    max_pending: Annotated[int, typer.Option(min=1, help="Requests taken in at once; the next one is refused.")] = 256,
    max_candidates: Annotated[int, typer.Option(min=1, help="Candidates that a request may have.")] = 10_000,
    max_message_mb: Annotated[int, typer.Option(min=1, max=2047, help="Size that a request may have, in MB.")] = 16,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long the end waits for requests under way.")] = 10.0,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP port of the JSON gateway. Default: none.")] = None,
    admin_port: Annotated[int | None, typer.Option(min=0, max=65535, help="gRPC port of ninerank.v1.Admin. Default: none.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the server's certificate: serve over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="PEM file of who signs clients' certificates: let in no others (mTLS).")] = None,
    tokens: Annotated[Path | None, typer.Option(help="Token file, one `name token [requests_per_s]` a line: let in no others.")] = None,
    admin_tokens: Annotated[Path | None, typer.Option(help="Token file of the admin port.")] = None,
    quota: Annotated[float | None, typer.Option(help="Requests a second of each client whose line names none.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:i] or npu[:i].")] = "auto",
    backend: Annotated[
        str, typer.Option(help="What runs the graph: auto, script, openvino, inductor, aoti, cudagraphs, npugraphs, eager.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16: hidden layers of the graph, scores within 2e-3.")] = "fp32",
) -> None:
    """Serve a bundle, or models as they come, over gRPC until SIGTERM or Ctrl-C, then finish what is under way."""
    from ninerank.predictor.serveconfig import ServeConfig
    from ninerank.predictor.serving import serve

    config = ServeConfig.parse(
        {
            "host": host,
            "port": port,
            "metrics_port": metrics_port,
            "http_port": http_port,
            "admin_port": admin_port,
            "security": {
                "certificate": tls_cert,
                "key": tls_key,
                "client_ca": client_ca,
                "tokens": tokens,
                "admin_tokens": admin_tokens,
                "requests_per_s": quota,
            },
            "device": device,
            "backend": backend,
            "precision": precision,
            "processes": processes,
            "workers": workers,
            "max_pending": max_pending,
            "max_message_bytes": max_message_mb << 20,
            "max_candidates": max_candidates,
            "items": items,
            "item_key": item_key,
            "users": users,
            "user_key": user_key,
            "features": features,
            "cache_bytes": cache_mb << 20,
            "user_cache_bytes": user_cache_mb << 20,
            "cache": {"ttl_s": cache_ttl, "max_stale_s": cache_max_stale},
            "poll_s": poll_seconds,
            "keep": keep,
            "model_copies": model_copies,
            "log_dir": log_dir,
            "log": {"sample_rate": log_sample, "max_seconds": log_seconds},
            "drain_s": drain_seconds,
        },
        "serve",
    )
    serve(bundle, config, ready=_announce)
    print("stopped", flush=True)


def _announce(ready: "Announcement") -> None:
    """The line that scripts wait for; the ports are the last words of what they read."""
    print(f"serving {ready.model_name} {ready.model_version} on {ready.device} at {ready.host}:{ready.port}", flush=True)
    for line in ready.caches:
        print(f"feature cache: {line}", flush=True)
    if ready.http_port is not None:
        print(f"JSON at http://{ready.host}:{ready.http_port}/v1/rank", flush=True)
    if ready.admin_port is not None:
        print(f"admin at {ready.host}:{ready.admin_port}", flush=True)
    if ready.metrics_port is not None:
        print(f"metrics at http://{ready.host}:{ready.metrics_port}/metrics", flush=True)
