"""The server that ``jobs`` and ``ranks`` fork their processes from: one for each process of pytest.

What it imports first, its processes need not import again; the list is the server's, so it is in one place.
"""

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["fault_points", "torch._dynamo", "tensorboard.compat.proto.event_pb2",
     "tensorboard.summary.writer.record_writer", "rich.progress", "torch.distributed.fsdp",
     "torch.distributed.tensor.parallel", "torch.distributed.pipelining"]
)  # fmt: skip
