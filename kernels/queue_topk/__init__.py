"""Exact top-k nearest neighbours in a ring-buffer queue, and the ring buffer's update."""

from maect_fast.kernels.queue_topk.api import queue_topk
from maect_fast.kernels.queue_topk.buffer import enqueue, with_shadow
from maect_fast.kernels.queue_topk.reference import Pick, QueueState, Shadow, TopK

__all__ = ["Pick", "QueueState", "Shadow", "TopK", "enqueue", "queue_topk", "with_shadow"]
