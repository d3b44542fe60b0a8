"""What the compiler makes of every Triton kernel, held to the limits beside its launch table."""
