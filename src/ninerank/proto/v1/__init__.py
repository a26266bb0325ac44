"""Generated code of the wire package `ninerank.v1`: `predictor_pb2` (messages) and `predictor_pb2_grpc` (stubs)."""
