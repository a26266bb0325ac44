"""Online ranking: bundles, the engine that scores them, and the gRPC server and client around it.

    bundle.py manifest.py graph.py   what is served: a directory of files with checksums and golden scores
    engine.py request.py             RankInput -> RankOutput, in process
    cache/ requestlog.py             features by id; a sampled log of what was asked and answered
    wire.py service.py explain.py    one model version's answers: RankRequest -> RankResponse
    host.py                          which model version answers: leases, so that versions can come and go under load
    call.py admission.py dispatch.py the bounded queue before the models, and what computes what it lets through
    front.py status.py               calls as bytes, through queue and host; what a caller is told of a failure
    routes.py grpcport.py server.py client.py   gRPC around it
    openinference.py tensors.py gateway.py      the same in the Open Inference Protocol, and in JSON over HTTP
    security.py tls.py admin.py      who may call; what changes a server while it serves
    serving.py supervisor.py worker.py control.py   one process or several on a port, and who replaces those that die

Training and what lies below it never import this room. aiohttp is imported by `gateway` alone, grpc by `routes`, `grpcport`, `tls` and the
clients.
"""
