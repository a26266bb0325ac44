"""Generated code of the Open Inference Protocol, `open_inference_pb2`; a process that holds another copy of it cannot load this one."""
