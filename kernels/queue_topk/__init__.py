"""Exact top-k nearest neighbours in a ring-buffer queue, and the ring buffer's update."""

from maect_fast.kernels.queue_topk.api import enqueue, queue_topk
from maect_fast.kernels.queue_topk.reference import Pick, QueueState, TopK

__all__ = ["Pick", "QueueState", "TopK", "enqueue", "queue_topk"]
