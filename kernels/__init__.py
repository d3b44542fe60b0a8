"""Compiled ops: masked_attention, queue_topk, info_nce."""
