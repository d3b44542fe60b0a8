"""How fast the ops are, beside whom, and how near to what the machine can do at best.

Installed as `maect_fast.benchmarks`; needs nothing but torch, triton and numpy, matplotlib for
pictures.
"""
