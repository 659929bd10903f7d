"""`flash-attn-res bench`: one module for each suite, and what they share in `harness`."""
