"""Online ranking: bundles, the engine that scores them, and the gRPC server and client around it.

    bundle.py manifest.py graph.py   what is served: a directory of files with checksums and golden scores
    engine.py request.py             RankInput -> RankOutput, in process
    cache.py requestlog.py           item features by id; a sampled log of what was asked and answered
    wire.py service.py               RankRequest bytes -> RankResponse bytes
    server.py client.py              gRPC around it

Training and what lies below it never import this room; grpc is imported by `server` and `client` alone.
"""
