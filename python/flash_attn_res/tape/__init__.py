"""The memory-lean stream of eager PyTorch, for training at the price of a plain residual.

Autograd sees the sublayers' inputs and outputs and the running sums, and nothing else that is
large. What belongs to several sites goes past it, over a *tape* that one forward pass shares:

* Gradients of the sources. Each source has one buffer, to which the backward of every site that
  read it adds in place. Nodes are ordered by *tokens*, empty tensors that form one chain: whatever
  reads a source takes a token that was made after it, so that a source's buffer is complete when
  the node that made the source runs.
* Storage modes. With ``block_storage`` the completed sources are quantised; a source's gradient is
  that of the value that it stands for, and goes to what the value was made of. The embedding is
  kept as it came, too: the first block reads it alone. With ``sum_dtype`` running sums and their
  gradients are float32, sources and x of the stream's dtype.
* Phase-1 results. A group's results [S, T, D] live while the group runs forward; the backward
  computes them again, once a group (or keeps them, by an option). The gradient of a phase-1 result
  is never written: a site's backward writes dh over its row of the results, and the phase-1
  backward reads dh with the site's gate p_0.

====================  ==============================================  ===========================
node                  forward                                         backward
====================  ==============================================  ===========================
``Start``            takes embedding and queries                     hands out their gradients
``Close``            adds a block's last output; the sum is a        hands out the gradient of
                      source                                          the sum
``Open``             phase 1 of a group                              phase 1's backward
``Read``             one site                                        the site's backward
====================  ==============================================  ===========================

Kept for the backward, per site: the running sum [T, D], where a plain network keeps the residual
stream, and 2 K + 1 floats a token for K softmax terms. The sources that the sites of a group share
are saved by its ``Open``: what autograd is handed at every site costs the host time.

State of a backward pass belongs to that pass: a node that finds the state of another one (a pass
over a part of the graph, or one that an exception ended) drops it. No node is reachable from the
tape, so that a graph and its tape are freed by reference counting.
"""

from flash_attn_res.tape.state import Given
from flash_attn_res.tape.stream import KEEP, TapeStream

__all__ = ["KEEP", "Given", "TapeStream"]
